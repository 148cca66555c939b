"""What every training page does around its loop: determinism, batch division, checks, memory."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssdd.engine import checkpoint
from ssdd.engine.errors import UserError
from ssdd.engine.processes import Processes


def choose_kernels(deterministic: bool) -> None:
    """Refuse operations whose result depends on timing, or allow them; for the process, whatever was set before."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def rows_a_process(key: str, batch_size: int, world: int, parts: int) -> int:
    """Rows of a step's batch that each of `world` processes gets; UserError when they do not divide into `parts`."""
    if batch_size < 1 or parts < 1 or batch_size % (world * parts):
        raise UserError(
            f"{key}={batch_size} does not divide into {world} processes of {parts} accumulated parts each; "
            f"choose a multiple of {world * max(parts, 1)}"
        )
    return batch_size // world


def check_identity(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """UserError that names what changed since the checkpoint in `folder` was written."""
    changed = [f"{key} was {found.get(key)}, is {wanted[key]}" for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise UserError(
            f"the run's checkpoint {folder} does not continue with this config and data: {'; '.join(changed)}. "
            "Restore the old values, or choose another run_name."
        )


def check_finite(processes: Processes, bad_step: Tensor, last: Path) -> None:
    """UserError when `bad_step` (int scalar, -1: none) names a step with a non-finite loss in any process."""
    bad = [step for step in processes.gather(bad_step.unsqueeze(0)).tolist() if step >= 0]
    if bad:
        kept = f", and {last} keeps what came before" if checkpoint.exists(last) else " before the first checkpoint"
        raise UserError(
            f"the loss or its gradient was not finite at step {min(bad)}; training stopped{kept}. "
            "Lower training.lr, set training.grad_clip, or use training.mixed_precision=no, and start again."
        )


def picture_due(every: int | None, done: int, otherwise: bool) -> bool:
    """Whether `done` steps call for a picture: every so many (0: never), or for None if `otherwise` does."""
    return otherwise if every is None else every > 0 and done % every == 0


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; through pinned memory where a copy of other memory could wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
    """Peak resident bytes of a process that runs, or "self"; 0 where Linux does not tell."""
    try:
        told = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    peak = re.search(r"VmHWM:\s+(\d+) kB", told)
    return int(peak[1]) * 1024 if peak else 0
