"""Checks of a training page: keys, divisible batch, resumable checkpoint, finite loss, pictures that are due."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssdd.engine import checkpoint
from ssdd.engine.errors import UserError
from ssdd.engine.processes import Processes
from ssdd.engine.training_keys import TrainingKeys


def check_training(training: TrainingKeys, planned: Mapping[str, int]) -> None:
    """UserError for numbers that no run can work with; planned: key of `training` -> how long the run lasts."""
    for key, value in {**planned, "save_every": training.save_every, "log_freq": training.log_freq}.items():
        if value < 1:
            raise UserError(f"training.{key}={value} must be at least 1")
    if training.grad_clip < 0:
        raise UserError(f"training.grad_clip={training.grad_clip:g} must not be negative; 0 disables clipping")
    if training.fsdp and training.compile:
        raise UserError("training.fsdp=true does not support compiled networks yet: set training.compile=false")


def rows_a_process(key: str, batch_size: int, world: int, parts: int) -> int:
    """Rows of a step's batch that each of `world` processes gets; UserError when they do not divide into `parts`."""
    if batch_size < 1 or parts < 1 or batch_size % (world * parts):
        raise UserError(
            f"{key}={batch_size} does not divide into {world} processes of {parts} accumulated parts each; "
            f"choose a multiple of {world * max(parts, 1)}"
        )
    return batch_size // world


def parts_of(rows: int, count: int) -> list[slice]:
    """The rows of every part that a step's `rows` are split into, in order; `count` divides them."""
    size = rows // count
    return [slice(first, first + size) for first in range(0, rows, size)]


def check_identity(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """UserError that names what changed since the checkpoint in `folder` was written."""
    changed = [f"{key} was {found.get(key)}, is {wanted[key]}" for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise UserError(
            f"the run's checkpoint {folder} does not continue with this config and data: {'; '.join(changed)}. "
            "Restore the old values, or choose another run_name"
        )


class FirstBadStep:
    """The first step with a loss or gradient that is not finite; found on the device, read where a line is due."""

    def __init__(self, device: torch.device):
        self.step = torch.full((), -1, device=device)  # -1: none
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, *values: Tensor | None) -> None:
        """Scalars of the current step; None is left out."""
        for value in values:
            if value is not None:
                self._finite = self._finite & value.isfinite()

    def end(self, done: int) -> None:
        """The current step, the `done`-th, is over."""
        self.step = torch.where((self.step < 0) & ~self._finite, done, self.step)
        self._finite = torch.ones_like(self._finite)

    def check(self, processes: Processes, last: Path) -> None:
        """UserError when any process has seen a bad step. Waits for the device."""
        bad = [step for step in processes.gather(self.step.unsqueeze(0)).tolist() if step >= 0]
        if bad:
            kept = f", and {last} keeps what came before" if checkpoint.exists(last) else " before the first checkpoint"
            raise UserError(
                f"the loss or its gradient was not finite at step {min(bad)}; training stopped{kept}. "
                "Lower training.lr, set training.grad_clip, or use training.mixed_precision=no, and start again"
            )


def picture_due(every: int | None, done: int, otherwise: bool) -> bool:
    """Whether `done` steps call for a picture: every so many (0 disables them), or for None if `otherwise` does."""
    return otherwise if every is None else every > 0 and done % every == 0
