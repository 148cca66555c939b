"""Mixed precision by name: which autocast `auto` stands for on a device."""

from __future__ import annotations

import torch

from ssdd.engine.errors import UserError

PRECISIONS = ("auto", "no", "bf16", "fp16")


def native_bf16(device: torch.device | str) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones there: CUDA since Ampere, CPUs with BF16 or AMX."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def mixed_precision(name: str, device: torch.device | str) -> str:
    """accelerate's name ("no", "bf16", "fp16") for a config's `mixed_precision`; `auto` is bf16 where it is native.

    UserError for fp16 on a CPU, whose gradients would need a loss scaler that exists for GPUs only.
    """
    if name == "auto":
        return "bf16" if native_bf16(device) else "no"
    if name == "fp16" and torch.device(device).type == "cpu":
        raise UserError("mixed_precision=fp16 needs a GPU; on a CPU choose auto, no or bf16.")
    return name
