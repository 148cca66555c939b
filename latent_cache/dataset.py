"""Read a cache: rows of normalised latents gathered from mapped shards, in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latent_cache.manifest import STATISTICS, layout_of, load_manifest, shard_ranges
from latent_cache.shard import Shard, shard_name
from latent_cache.verify import split_problems, statistics_problems
from ssdd.engine.errors import UserError
from ssdd.engine.noise import batch_generator
from ssdd.engine.sources import random_state
from ssdd.latent import DiagonalGaussian, LatentNorm

Rows = Sequence[int] | np.ndarray | Tensor
VERIFY = ("none", "quick", "full")


class LatentDataset(torch.utils.data.Dataset):
    """One split of a cache, map-style: len(ds), ds[i] -> (float32 [C, h, w], label), ds.gather(indices).

    All latents are normalised; `norm` turns them back. With content=moments every access draws a new sample from the
    posterior.

    path: folder of the cache. verify: "quick" holds sizes, counts and names of all files against the manifest, "full"
    also the checksum of every shard, "none" only what is needed to map the files. fingerprint: of the encoder that the
    latents must come from (`SSDD.encoder_fingerprint()`), if that matters. UserError for anything that is wrong.
    """

    def __init__(
        self, path: str | Path, split: str = "train", verify: str = "quick", fingerprint: str | None = None
    ) -> None:
        if verify not in VERIFY:
            raise UserError(f"verify={verify}: expected one of {', '.join(VERIFY)}")
        self.path, self.split = Path(path), split
        self.manifest = load_manifest(path)
        if split not in self.manifest["splits"]:
            raise UserError(f"the cache {path} has no split {split!r}, only {', '.join(self.manifest['splits'])}")
        if verify != "none":
            problems = [
                *statistics_problems(self.path, self.manifest),
                *split_problems(self.path, self.manifest, split, verify),
            ]
            if problems:
                more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
                raise UserError(problems[0] + more)
        self.norm = LatentNorm.load(self.path / STATISTICS, fingerprint or self.manifest["tokenizer"]["fingerprint"])
        self.class_names: list[str] = self.manifest["classes"]
        self.has_flips = "flip.npy" in self.manifest["views"]
        self.has_moments = self.manifest["content"] == "moments"
        self._state = {"seed": 0, "epoch": 0, "position": 0}
        self._loaded: dict | None = None

    @cached_property
    def _shards(self) -> list[Shard]:
        layout = layout_of(self.manifest)
        folder = self.path / self.split
        return [
            Shard(folder / f"{shard_name(number)}.tar", layout, samples)
            for number, samples in enumerate(shard_ranges(self.manifest, self.split))
        ]

    def __getstate__(self) -> dict:
        """For worker processes: without the mapped shards, which each process maps for itself."""
        return {key: value for key, value in vars(self).items() if key != "_shards"}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        rows, height, width = self.manifest["shape"]
        return rows // 2 if self.has_moments else rows, height, width

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def labels(self) -> np.ndarray:
        """Class of every sample: int64 [len(ds)]."""
        return np.concatenate([shard.labels() for shard in self._shards])

    def __len__(self) -> int:
        return self.manifest["splits"][self.split]["count"]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        latents, labels = self.gather([index % len(self)])
        return latents[0], int(labels[0])

    def gather(
        self,
        indices: Rows,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        flipped: Rows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples `indices` in that order: (latents float32 [n, C, h, w], labels int64 [n]), on the CPU.

        content=moments: draws from the posteriors, with `noise` [n, C, h, w] if given, else from `generator` or
        torch's global one. flipped: bool [n], where to take the stored latent of the mirrored image.
        """
        indices = np.asarray(indices, dtype=np.int64)
        rows = self._gather_rows(indices, flipped)
        latents = DiagonalGaussian(rows).sample(generator, noise) if self.has_moments else rows
        return latents, torch.from_numpy(self.labels[indices])

    def _gather_rows(self, indices: np.ndarray, flipped: Rows | None) -> Tensor:
        """Stored rows: float32 [n, K, h, w]."""
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"sample indices of {self.split} lie in 0..{len(self) - 1}")
        if flipped is not None and not self.has_flips:
            raise UserError(f"the cache {self.path} has no mirrored latents: build it with views.flip=true")
        per_shard = self.manifest["samples_per_shard"]
        bins = indices // per_shard
        if flipped is not None:  # views of a shard are gathered one after the other
            bins = bins * 2 + np.asarray(flipped, dtype=bool)
        order = np.argsort(bins, kind="stable")
        bounds = np.flatnonzero(np.diff(bins[order], prepend=-1, append=-1))
        rows = np.empty((len(indices), *self.manifest["shape"]), dtype=np.float16)
        for start, stop in zip(bounds, bounds[1:], strict=False):
            places = order[start:stop]
            number, view = (bins[places[0]], 0) if flipped is None else divmod(bins[places[0]], 2)
            shard = self._shards[number]
            rows[places] = shard.rows(indices[places] - number * per_shard, shard.layout.views[view])
        return torch.from_numpy(rows).float()

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of all samples in an epoch, a function of (seed, epoch): int64 [len(ds)]."""
        return random_state("epoch order", seed, epoch).permutation(len(self))

    def batches(
        self, batch_size: int, seed: int = 0, start_step: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Endless training batches of this process: (latents float32 [b, C, h, w], labels [b], indices [b]).

        batch_size counts all processes together; process `rank` gets rows [rank b, (rank + 1) b) of every batch, so all
        have equally many steps. Every epoch has a new order; the rest after its last whole batch is dropped, and a set
        smaller than a batch is repeated to fill it. Flips (half of the time, where stored) and posterior samples are
        drawn for the whole batch, so nothing depends on `world`. Begins at `start_step`; without it, once after
        `load_state_dict`, where that state points to, and else at the first step.
        """
        if batch_size < 1 or batch_size % world:
            raise UserError(f"batch_size={batch_size} can't be divided over {world} processes")
        epoch, position = 0, 0
        if start_step is not None:
            epoch, position = divmod(start_step * batch_size, self._epoch_samples(batch_size))
        elif self._loaded is not None:
            if self._loaded["seed"] != seed:
                raise UserError(f"seed={seed}, but the state to go on from belongs to seed {self._loaded['seed']}")
            epoch, position = self._loaded["epoch"], self._loaded["position"]
            self._loaded = None
        return self._batches(batch_size, seed, epoch, position, rank, world)

    def _epoch_samples(self, batch_size: int) -> int:
        """Samples of the whole batches of an epoch."""
        return max(len(self) // batch_size, 1) * batch_size

    def _batches(
        self, batch_size: int, seed: int, epoch: int, position: int, rank: int, world: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        own = slice(rank * (batch_size // world), (rank + 1) * (batch_size // world))
        while True:
            samples = self._epoch_samples(batch_size)
            order = np.resize(self.epoch_order(seed, epoch), samples)
            while position + batch_size <= samples:
                indices = order[position : position + batch_size][own]
                flipped = noise = None
                if self.has_flips:
                    generator = batch_generator("cpu", seed, "flip", epoch, position)
                    flipped = torch.rand(batch_size, generator=generator)[own] < 0.5
                if self.has_moments:
                    generator = batch_generator("cpu", seed, "posterior", epoch, position)
                    noise = torch.randn(batch_size, *self.latent_shape, generator=generator)[own]
                latents, labels = self.gather(indices, noise=noise, flipped=flipped)
                position += batch_size
                self._state = {"seed": seed, "epoch": epoch, "position": position}
                yield latents, labels, torch.from_numpy(indices)
            epoch, position = epoch + 1, 0

    def state_dict(self) -> dict:
        """Where the newest iterator of `batches` stands: {"seed", "epoch", "position"}, in samples of all processes."""
        return dict(self._state)

    def load_state_dict(self, state: dict) -> None:
        """Let the next `batches` go on there, with any number of processes."""
        self._state = {key: int(state[key]) for key in ("seed", "epoch", "position")}
        self._loaded = self._state
