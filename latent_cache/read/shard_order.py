"""The order of a streamed cache: shards one after the other, and their samples shuffled within windows of shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssdd.engine.errors import UserError
from ssdd.engine.random import random_state


@dataclass(frozen=True)
class ShardOrder:
    """How the samples of an epoch follow each other, the same in every process."""

    shuffle: bool = True
    """Take the shards in an order that depends on (seed, epoch) alone, and shuffle the samples of a window. Without it,
    samples come in their own order."""
    window: int = 16
    """Shards whose samples are shuffled together. A cache whose source is sorted by class wants a wide window."""
    parts: int = 1
    """Runs of shards that an epoch is cut into, of which every batch takes equally many samples: with as many as there
    are machines, each downloads its own."""

    def __post_init__(self) -> None:
        for name in ("window", "parts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected a positive number")

    def arrangement(self, batch_size: int) -> dict[str, int]:
        """What the order depends on besides the seed. UserError for a batch that the parts do not divide."""
        if batch_size % self.parts:
            raise UserError(
                f"parts={self.parts} does not divide batch_size={batch_size} (or, when iterating, the number of "
                "processes and workers)"
            )
        found = {"window": self.window if self.shuffle else 0, "parts": self.parts}
        return found | ({"batch_size": batch_size} if self.parts > 1 else {})

    def samples(self, shards: Sequence[range], seed: int, epoch: int, batch_size: int) -> np.ndarray:
        """The samples of an epoch in order, int64 [n]; shards: the sample indices of each."""
        count = shards[-1].stop
        order = np.arange(count)
        if self.shuffle:
            numbers = random_state("shard order", seed, epoch).permutation(len(shards))
            draw = random_state("window order", seed, epoch)
            windows = [numbers[first : first + self.window] for first in range(0, len(numbers), self.window)]
            order = np.concatenate([draw.permutation(np.concatenate([shards[n] for n in part])) for part in windows])
        steps = count // batch_size
        if self.parts > 1 and steps:
            runs = order[: steps * batch_size].reshape(self.parts, steps, -1)
            order = np.ascontiguousarray(runs.transpose(1, 0, 2)).reshape(-1)
        return order
