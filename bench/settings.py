"""Keys that several benchmarks share, and what their values must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ssdd.engine.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Rounds:
    """How often something is measured."""

    rounds: int = 5
    """Rounds that count; what is compared alternates, so that other load on the machine affects all equally."""
    json: str | None = None
    """File for the results."""


@dataclass
class Forms(Rounds):
    """In which forms, one table each."""

    dtype: list[str] = field(default_factory=lambda: ["float32"], metadata={"choices": tuple(DTYPES)})
    """bfloat16: autocast of DiTs and in training, where weights stay float32; else weights of that type."""
    compile: list[bool] = field(default_factory=lambda: [False], metadata={"choices": (False, True)})
    """torch.compile all networks."""


def form(compiled: bool) -> str:
    """How a table shows whether torch.compile is on."""
    return "compiled" if compiled else "eager"


def check_positive(settings: Any, *names: str) -> None:
    """UserError unless each of these settings is at least 1, or a list of such numbers that is not empty."""
    for name in names:
        value = getattr(settings, name)
        if not value or min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"{name}={value}: must be at least 1")


def check_lists(settings: Any, *names: str) -> None:
    """UserError where one of these lists is empty: there would be nothing to measure."""
    for name in names:
        if not getattr(settings, name):
            raise UserError(f"{name}=[]: name at least one")
