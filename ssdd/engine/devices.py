"""The device that a program computes on: its kernels, copies to it, waiting for it, peak memory."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def choose_kernels(deterministic: bool = False, tf32: bool = True) -> None:
    """Which kernels this process takes from here on, whatever was set before.

    deterministic: refuse operations whose result depends on timing. tf32: float32 convolutions on CUDA may round their
    inputs to 10 bits of mantissa (torch's default); off where figures are measured.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions of the block keep all bits of float32 inputs on CUDA; what was set before comes back."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; through pinned memory where a copy of other memory could wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU where it has no float64 (Apple's)."""
    return torch.device("cpu") if device.type == "mps" else device


def synchronize(device: torch.device) -> None:
    """Wait for the device's work, before and after a timed section; nothing on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := resident_peak("self"):  # on Linux ru_maxrss begins with the peak of the process that started this one
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_peak(process: int | str) -> int:
    """Peak resident bytes of a process that runs, or "self"; 0 where it is not recorded (not Linux)."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(peak[1]) * 1024 if peak else 0
