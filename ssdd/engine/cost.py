"""What a dry run says: the cost of a run on this machine, measured on a few of its steps; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ssdd.engine.devices import peak_memory
from ssdd.engine.precision import Precision
from ssdd.engine.tables import listed
from ssdd.engine.throughput import seconds_a_call


def training_cost(steps: int, step: Callable[[], object], precision: Precision) -> dict[str, Any]:
    """What `steps` calls of `step`, a whole training step of this process, take; evaluations are not counted.

    {"peak_memory_bytes", "seconds_a_step", "steps", "precision", "hours"}
    """
    seconds = seconds_a_call(precision.device, step)
    return {
        "peak_memory_bytes": peak_memory(precision.device),
        "seconds_a_step": seconds,
        "steps": steps,
        "precision": precision.record(),
        "hours": steps * seconds / 3600,
    }


def training_lines(cost: Mapping[str, Any], part: str) -> dict[str, str]:
    """Lines of `cost_page` for a `training_cost`; part: what a process computes at once, such as "8 images"."""
    return {
        "memory": f"{cost['peak_memory_bytes'] / 2**30:.2f} GiB for {part} per process and part",
        "time": f"{cost['seconds_a_step']:.3f} s per step, {cost['steps']} steps, {cost['hours']:.2f} hours without "
        "evaluations",
    }


def cost_page(lines: Mapping[str, str]) -> str:
    """The figures of a dry run, a line for each name."""
    return f"{listed(lines)}\nnothing was written"
