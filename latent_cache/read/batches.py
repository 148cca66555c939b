"""Endless training batches of a cache, resumable to the sample and the same for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.random import batch_generator

Batch = tuple[Tensor, Tensor, Tensor]  # latents float32 [b, C, h, w], labels int64 [b], indices int64 [b]


class Latents(Protocol):
    """What batches are drawn from: a split of a cache, mapped or streamed."""

    has_moments: bool
    has_flips: bool
    latent_shape: tuple[int, int, int]

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Step:
    """What one process reads in one step: row `number` of its schedule."""

    epoch: int
    schedule: np.ndarray  # int64 [steps, b], the samples of this process, to the end of the epoch
    number: int
    flipped: Tensor | None  # bool [b]
    noise: Tensor | None  # float32 [b, C, h, w]

    @property
    def indices(self) -> np.ndarray:
        return self.schedule[self.number]


def _seed_alone(batch_size: int) -> dict[str, int]:
    return {}


class BatchSequence:
    """The batches of `latents`, and where their newest iterator stands.

    order(seed, epoch, batch_size): the samples of an epoch in order, int64 [len(latents)]. arrangement(batch_size):
    what that order depends on besides the seed, if anything; a state to continue from must have been saved with the
    same. noise: draw that of posterior samples, where the cache has posteriors.
    """

    def __init__(
        self,
        latents: Latents,
        order: Callable[[int, int, int], np.ndarray],
        arrangement: Callable[[int], dict[str, int]] = _seed_alone,
        noise: bool = True,
    ) -> None:
        self.latents, self.order, self.arrangement = latents, order, arrangement
        self.noisy = noise and latents.has_moments
        self.state = {"seed": 0, "epoch": 0, "position": 0}
        self.resumes = False  # the next iterator continues at `state`

    def load(self, state: dict) -> None:
        """Let the next iterator continue at `state`."""
        self.state = {key: int(value) for key, value in state.items()}
        self.resumes = True

    def run(
        self,
        read: Callable[[Step], Any],
        batch_size: int,
        seed: int = 0,
        start_step: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Any]:
        """What `read` makes of every step; the arguments are those of `LatentDataset.batches`."""
        arrangement = {"seed": seed, **self.arrangement(batch_size)}
        if batch_size < 1 or batch_size % world:
            raise UserError(f"batch_size={batch_size} can't be divided over {world} processes")
        epoch = position = 0
        if start_step is not None:
            epoch, step = divmod(start_step, max(len(self.latents) // batch_size, 1))
            position = step * batch_size
        elif self.resumes:
            epoch, position = self.state["epoch"], self.state["position"]
            if epoch or position:  # at the very start, no order has been drawn yet
                self._check(arrangement)
        self.resumes = False
        self.state = {"epoch": epoch, "position": position, **arrangement}
        return self._run(read, batch_size, arrangement, epoch, position, rank, world)

    def steps(
        self, batch_size: int, seed: int = 0, start_step: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Step]:
        """What `run` of the same arguments would read, without noise; leaves `state` alone."""
        silent = BatchSequence(self.latents, self.order, self.arrangement, noise=False)
        return silent.run(lambda step: step, batch_size, seed, start_step, rank, world)

    def _check(self, arrangement: dict[str, int]) -> None:
        """UserError unless `state` was saved with the same arrangement."""
        saved = {key: value for key, value in self.state.items() if key not in ("epoch", "position")}
        for key in dict.fromkeys([*arrangement, *saved]):
            if saved.get(key) != arrangement.get(key):
                kept = f"belongs to {key} {saved[key]}" if key in saved else "was saved by another kind of reader"
                raise UserError(f"{key}={arrangement.get(key)}, but the state to continue from {kept}")

    def schedule(
        self, batch_size: int, seed: int, epoch: int, position: int = 0, rank: int = 0, world: int = 1
    ) -> np.ndarray:
        """What process `rank` reads from `position` to the end of an epoch: int64 [steps, batch_size / world]."""
        order = self.order(seed, epoch, batch_size)
        if len(order) < batch_size:
            order = np.resize(order, batch_size)
        order = order[position:]
        steps = len(order) // batch_size
        return order[: steps * batch_size].reshape(steps, world, batch_size // world)[:, rank]

    def _run(
        self,
        read: Callable[[Step], Any],
        batch_size: int,
        arrangement: dict[str, int],
        epoch: int,
        position: int,
        rank: int,
        world: int,
    ) -> Iterator[Any]:
        seed, own = arrangement["seed"], slice(rank * (batch_size // world), (rank + 1) * (batch_size // world))
        while True:
            schedule = self.schedule(batch_size, seed, epoch, position, rank, world)
            for number in range(len(schedule)):
                flipped, noise = self._draws(batch_size, seed, epoch, position, own)
                batch = read(Step(epoch, schedule, number, flipped, noise))
                position += batch_size
                self.state = {"epoch": epoch, "position": position, **arrangement}
                yield batch
            epoch, position = epoch + 1, 0

    def _draws(
        self, batch_size: int, seed: int, epoch: int, position: int, own: slice
    ) -> tuple[Tensor | None, Tensor | None]:
        """Rows `own` of the mirroring and posterior noise of a batch, drawn for the whole of it."""
        flipped = noise = None
        if self.latents.has_flips:
            generator = batch_generator("cpu", seed, "flip", epoch, position)
            flipped = torch.rand(batch_size, generator=generator)[own] < 0.5
        if self.noisy:
            generator = batch_generator("cpu", seed, "posterior", epoch, position)
            noise = torch.randn(batch_size, *self.latents.latent_shape, generator=generator)[own]
        return flipped, noise
