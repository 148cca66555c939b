"""Sums and rows of tensors over all processes, and the device that float64 is computed on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU where it has no float64 (Apple's)."""
    return torch.device("cpu") if device.type == "mps" else device


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the device of their collectives."""
    tensor = tensor.to(_collective_device()).clone()
    dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes, in rank order, on the CPU; each may have another number of them."""
    world, device = dist.get_world_size(), _collective_device()
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=device))
    longest = int(max(counts))
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(count)].cpu() for part, count in zip(gathered, counts, strict=True)])


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
