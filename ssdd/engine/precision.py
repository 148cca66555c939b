"""Mixed precision: the one place that decides which autocast a name means on a device, and why.

A `Precision` is a value that is passed to the code that computes. It is not process-wide state, so that tasks of any
precision run one after the other in one process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from ssdd.engine.errors import UserError

PRECISIONS = ("auto", "no", "bf16", "fp16")
VARIABLE = "SSDD_PRECISION"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """How networks compute on `device`: float32 ("no"), or autocast to bfloat16 or float16 with float32 weights.

    why: what decided it, such as "auto: bf16, AVX512-BF16", or the name itself where it was requested.
    """

    name: str
    why: str
    device: torch.device

    @classmethod
    def resolve(cls, name: str, device: torch.device | str, measuring: bool = False) -> Precision:
        """The precision that `mixed_precision=name` stands for on a device.

        `auto` takes the value of the environment variable SSDD_PRECISION; without it float32 where figures are measured
        (`measuring`), else bf16 where the device computes in it natively. UserError for fp16 on a device without a
        loss scaler, and for an unknown name.
        """
        device, why = torch.device(device), name
        where = f"mixed_precision={name}"
        if name == "auto":
            if forced := forced_precision():
                name, reason, where = forced, VARIABLE, f"{VARIABLE}={forced}"
            elif measuring:
                name, reason = "no", "measured in float32"
            else:
                native = native_bf16(device)
                name, reason = ("bf16", native) if native else ("no", f"no native bfloat16 on this {device.type}")
            why = f"auto: {name}, {reason}"
        if name not in DTYPES:
            raise UserError(f"{where} is unknown: choose one of {', '.join(PRECISIONS)}")
        if name == "fp16" and device.type not in ("cuda", "xpu"):
            raise UserError(f"{where} needs a GPU with a loss scaler: on {device.type} choose auto, no or bf16")
        return cls(name, why, device)

    @classmethod
    def float32(cls, device: torch.device | str) -> Precision:
        """For work that has no choice."""
        return cls("no", "always float32", torch.device(device))

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products and convolutions compute in."""
        return DTYPES[self.name]

    def autocast(self) -> torch.autocast:
        """The context of forward passes; for "no" it switches a caller's autocast off."""
        if self.name == "no":
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, self.dtype)

    def loss_scaler(self) -> torch.amp.GradScaler:
        """Scales losses where gradients need it, which is fp16 alone; elsewhere its methods pass everything through."""
        enabled = self.name == "fp16"
        return torch.amp.GradScaler(self.device.type if enabled else "cpu", enabled=enabled)

    def record(self) -> dict[str, Any]:
        """What results and manifests record: {"mixed_precision": name, "why": ...}, and what else rounding depends on.

        That is on a CPU the capability, and on CUDA whether float32 convolutions may take TF32 now.
        """
        recorded: dict[str, Any] = {"mixed_precision": self.name, "why": self.why}
        if self.device.type == "cpu":
            recorded["cpu"] = cpu_capability()
        if self.device.type == "cuda":
            recorded["tf32"] = torch.backends.cudnn.allow_tf32
        return recorded

    def __str__(self) -> str:
        return self.why


def forced_precision() -> str | None:
    """What SSDD_PRECISION says that `auto` is, in this process and the ones it starts; None: nothing.

    UserError for a name that it does not know.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", *PRECISIONS):
        raise UserError(f"{VARIABLE}={forced} is unknown: choose one of {', '.join(PRECISIONS)}")
    return None if forced in ("", "auto") else forced


def native_bf16(device: torch.device) -> str:
    """What makes bfloat16 matrix products faster than float32 ones there, such as "AMX"; "" where nothing does."""
    if device.type == "cuda":
        if torch.version.hip:
            return "ROCm"
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor}" if major >= 8 else ""
    if device.type == "xpu":
        return "XPU" if torch.xpu.is_bf16_supported() else ""
    if device.type == "cpu":
        if torch.cpu._is_amx_tile_supported():
            return "AMX"
        return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""
    return ""


def cpu_capability() -> str:
    """The instruction set that torch's kernels on this CPU use, such as "AVX2" or "AVX512".

    Sums are taken in another order on another one: equal bytes are promised for equal capabilities only.
    """
    return torch.backends.cpu.get_cpu_capability()
