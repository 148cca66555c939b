"""What a generator's training step reads: latents, labels, the step's draws, and images for REPA."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit.config import DiTConfig
from dit.objective import LatentDraws, step_draws
from dit.tasks.build import Cache
from dit.tasks.cache_images import CacheImages
from ssdd.engine.devices import to_device
from ssdd.engine.processes import Processes
from ssdd.engine.training_checks import parts_of, rows_a_process


@dataclass
class LatentBatch:
    """One process's rows of a step, on its device."""

    z: Tensor  # float32 [b, C, h, w], normalised
    y: Tensor  # int64 [b]
    draws: LatentDraws
    x: Tensor | None  # float32 [b, 3, H, W], what the latents were encoded from

    def rows(self, part: slice) -> tuple[Tensor, Tensor, LatentDraws, Tensor | None]:
        """Arguments of the objective: latents, labels, draws, images."""
        return self.z[part], self.y[part], self.draws.rows(part), None if self.x is None else self.x[part]


class TrainingLatents:
    """The latents of a cache as the batches of a config.

    with_images: read the images of the latents as well. rows: of a step that this process gets, in `parts`. UserError
    for a batch that cannot be divided, and for images that the cache was not built from.
    """

    def __init__(self, cfg: DiTConfig, cache: Cache, processes: Processes, with_images: bool):
        self.cfg, self.cache, self.processes = cfg, cache, processes
        self.batch_size, parts = cfg.training.batch_size, cfg.training.grad_accumulate
        self.rows = rows_a_process("training.batch_size", self.batch_size, processes.world, parts)
        self.parts = parts_of(self.rows, parts)
        self.images = CacheImages(cfg.dataset, cache) if with_images else None

    def read(self, start: int) -> Iterator[Any]:
        """Endless batches of this process, on the host, from step `start` on."""
        order = {"batch_size": self.batch_size, "seed": self.cfg.seed, "start_step": start}
        order |= {"rank": self.processes.rank, "world": self.processes.world}
        images = itertools.repeat(None) if self.images is None else self.images.batches(**order)
        return zip(self.cache.batches(**order), images, strict=False)  # both endless

    def made_up(self) -> LatentBatch:
        """The first step's batch with random latents, and black images if any: what a dry run measures with."""
        z, y = torch.randn(self.rows, *self.cache.latent_shape), torch.zeros(self.rows, dtype=torch.int64)
        side = self.cfg.dataset.im_size
        return self.batch(((z, y, None), None if self.images is None else torch.zeros(self.rows, 3, side, side)), 0)

    def batch(self, read: Any, step: int) -> LatentBatch:
        """What was `read` for a step, on the device, with the step's draws."""
        (z, y, _), x = read
        device = self.processes.device
        draws = step_draws(self.cfg, step, (self.batch_size, *z.shape[1:]), device)
        draws = draws.rows(self.processes.own(self.rows))
        z, y, x = (None if part is None else to_device(part, device) for part in (z, y, x))
        return LatentBatch(z, y, draws, x)
