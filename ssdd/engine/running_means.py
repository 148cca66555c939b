"""Means of what a training loop logs: summed on the device in every step, read only where a line is due."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ssdd.engine.processes import Processes


class RunningMeans:
    """Means of named scalars since the last line, each over the steps that had it."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        self.sums = torch.zeros(len(self.names), device=device)
        self.steps = dict.fromkeys(self.names, 0)

    def add(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Add `share` of the scalars, detached, to their sums: one of the parts that a step's batch is split into."""
        for i, name in enumerate(self.names):
            if name in values:
                self.sums[i] += values[name].detach() * share

    def count(self, names: Iterable[str]) -> None:
        """One more step has had these."""
        for name in names:
            self.steps[name] += 1

    def read(self, processes: Processes) -> dict[str, float]:
        """The means over all processes, but for names that no step had; starts anew. Waits for the device."""
        sums = dict(zip(self.names, processes.mean(self.sums).tolist(), strict=True))
        means = {name: sums[name] / count for name, count in self.steps.items() if count}
        self.sums.zero_()
        self.steps = dict.fromkeys(self.names, 0)
        return means

    def load(self, sums: Tensor, steps: Mapping[str, int], processes: Processes) -> None:
        """Continue with the sums [world, names] of all processes; those of another number of them are averaged."""
        self.sums.copy_(sums[processes.rank] if len(sums) == processes.world else sums.mean(0))
        self.steps |= {name: steps[name] for name in self.names if name in steps}
