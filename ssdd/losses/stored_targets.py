"""Stored targets of distillation: latent and teacher image of every training image, made once; noise by its seed.

A teacher of twelve steps costs several steps of its student; over more than one epoch, drawing its images again is most
of the work. A shard is the unit: written beside and renamed, so that an interrupted build continues.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ssdd.engine.checkpoint import save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_json
from ssdd.engine.log import ProgressLog
from ssdd.engine.random import indexed_noise
from ssdd.images.batches import read_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8
from ssdd.model.tokenizer import SSDD

SHARD = 64
"""Images per shard, and per batch of the teacher: the last bits depend on batches, so they are fixed."""


class TargetStore:
    """Latents z (float32) and teacher images (float16) of a data set, with `noises` draws of the noise for each image.

    folder: below it lies one folder for each `identity`, a JSON value that names everything the targets depend on.
    """

    def __init__(self, folder: Path, identity: Any, count: int, noises: int, seed: int):
        self.folder = folder / f"targets-{sha256_json([identity, noises, seed])[:16]}"
        self.count, self.noises, self.seed = count, noises, seed

    def noise(self, indices: Tensor, draw: int, shape: tuple[int, ...]) -> Tensor:
        """The noise [n, *shape] of draw number `draw` (taken modulo `noises`) of these images, float32, on the CPU."""
        return indexed_noise(indices * self.noises + draw % self.noises, shape, self.seed, "target")

    @torch.no_grad()
    def build(self, dataset: ImageDataset, teacher: SSDD, steps: int, rank: int, world: int) -> None:
        """Write the shards that are missing; process `rank` of `world` writes every `world`-th."""
        device = next(teacher.parameters()).device
        todo = [i for i in range(rank, self.noises * -(-self.count // SHARD), world) if not self._path(i).is_file()]
        with ProgressLog(len(todo), description="targets", main_process=rank == 0) as progress:
            keys = ([(0, index) for index in self._indices(shard)] for shard in todo)
            read = read_batches(dataset, keys, dataset.cfg.reading_processes)
            for shard, (asked, pixels, _, indices) in zip(todo, read, strict=True):
                if indices.tolist() != [index for _, index in asked]:
                    raise UserError("distill.targets=cache needs readable images only: dataset.on_corrupt=error")
                x = from_uint8(pixels.to(device))
                z = teacher.encode(x).mode()
                noise = self.noise(indices, shard % self.noises, tuple(x.shape[1:]))
                target = teacher.decode(z, steps=steps, noise=noise)
                save_tensors(self._path(shard), {"z": z, "target": target.half()})
                progress.advance()

    def gather(self, indices: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """z [n, c, h, w] and teacher images [n, 3, H, W] of these images at draw `draw`, float32."""
        rows = []
        for index in indices.tolist():
            shard, row = index // SHARD * self.noises + draw % self.noises, index % SHARD
            file = _open(self._path(shard))
            rows.append([file.get_slice(name)[row].float() for name in ("z", "target")])
        z, target = zip(*rows, strict=True)
        return torch.stack(z), torch.stack(target)

    def _indices(self, shard: int) -> range:
        """The images of a shard, which has one draw of the noise of each."""
        first = shard // self.noises * SHARD
        return range(first, min(first + SHARD, self.count))

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:08d}.safetensors"


@lru_cache(maxsize=256)
def _open(path: Path) -> Any:
    return safe_open(str(path), framework="pt")
