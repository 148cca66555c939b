"""Read a cache: rows of normalised latents gathered from mapped shards, in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latent_cache.manifest import STATISTICS, check_split, layout_of, load_manifest, shard_ranges
from latent_cache.read.batches import Batch, BatchSequence, Step
from latent_cache.shard import Shard, shard_name
from latent_cache.verify import split_problems, statistics_problems
from ssdd.engine.errors import UserError
from ssdd.engine.random import random_state
from ssdd.model.latent import DiagonalGaussian, LatentNorm

Indices = Sequence[int] | np.ndarray | Tensor
VERIFY = ("none", "quick", "full")
CHUNK = 1024  # samples that are copied together to where they are pre-loaded


class LatentDataset(torch.utils.data.Dataset):
    """One split of a cache, map-style: len(ds), ds[i] -> (float32 [C, h, w], label), ds.gather(indices).

    All latents are normalised; `norm` turns them back. With content=moments every access draws a new sample from the
    posterior.

    path: folder of the cache. verify: "quick" holds sizes, counts and names of all files against the manifest, "full"
    also the checksum of every shard, "none" only what is needed to map the files. fingerprint: of the encoder that the
    latents must come from (`SSDD.encoder_fingerprint()`), if that matters. preload: None maps the files; "ram" or a
    device ("cuda", "cuda:1") copies the split there once, as float16. UserError for anything that is wrong.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        verify: str = "quick",
        fingerprint: str | None = None,
        preload: str | torch.device | None = None,
    ) -> None:
        if verify not in VERIFY:
            raise UserError(f"verify={verify}: expected one of {', '.join(VERIFY)}")
        self.path, self.split = Path(path), split
        self.manifest = load_manifest(path)
        check_split(self.manifest, split, path)
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
        self.shard_samples = shard_ranges(self.manifest, split)  # the sample indices of each shard
        self._layout = layout_of(self.manifest)
        self._mapped: dict[int, Shard] = {}
        self._labels = np.full(len(self), -1, dtype=np.int64)  # of the shards that were mapped so far
        self._sequence = BatchSequence(self, self._order)
        self._rows = None if preload is None else self._preloaded(preload)

    def shard(self, number: int) -> Shard:
        """Shard `number` of this split, mapped at its first use."""
        if number not in self._mapped:
            path = self.path / self.split / f"{shard_name(number)}.tar"
            shard = self._mapped[number] = Shard(path, self._layout, self.shard_samples[number])
            self._labels[shard.samples.start : shard.samples.stop] = shard.labels()
        return self._mapped[number]

    def is_mapped(self, number: int) -> bool:
        return number in self._mapped

    def release(self, number: int) -> None:
        """Unmap shard `number`, if it is mapped; its next use maps it again."""
        self._mapped.pop(number, None)

    def _preloaded(self, where: str | torch.device) -> Tensor:
        """All stored rows: float16 [n, view, K h w] on the device `where`, or in memory for "ram"."""
        shape = (len(self), len(self._layout.views), int(np.prod(self._layout.shape)))
        try:
            rows = torch.empty(shape, dtype=torch.float16, device="cpu" if where == "ram" else where)
        except RuntimeError as error:  # no such device, or no such amount of memory
            raise UserError(
                f"preload={where}: {np.prod(shape) * 2 / 1e9:.1f} GB of latents can't be loaded there "
                f"({str(error).splitlines()[0]}): leave preload out to map the files"
            ) from None
        for number, samples in enumerate(self.shard_samples):
            for view, stored in enumerate(self.shard(number).views):
                for start in range(0, len(samples), CHUNK):
                    part = torch.from_numpy(np.array(stored[start : start + CHUNK]))
                    rows[samples.start + start :][: len(part), view] = part
            self.release(number)
        return rows

    def __getstate__(self) -> dict:
        """For worker processes: without the mapped shards, which each process maps for itself."""
        return {**vars(self), "_mapped": {}}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        rows, height, width = self.manifest["shape"]
        return rows // 2 if self.has_moments else rows, height, width

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def labels(self) -> np.ndarray:
        """Class of every sample: int64 [len(ds)]."""
        if self._rows is None:
            for number in range(len(self.shard_samples)):
                self.shard(number)
        return self._labels

    def __len__(self) -> int:
        return self.manifest["splits"][self.split]["count"]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        latents, labels = self.gather([index % len(self)])
        return latents[0], int(labels[0])

    def gather(
        self,
        indices: Indices,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        flipped: Indices | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples `indices` in that order: (latents float32 [n, C, h, w], labels int64 [n]).

        On the CPU, or on the device that they were pre-loaded to. content=moments: draws from the posteriors, with
        `noise` [n, C, h, w] if given, else from `generator` or torch's global one. flipped: bool [n], where to take the
        stored latent of the mirrored image.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"sample indices of {self.split} lie in 0..{len(self) - 1}")
        if flipped is not None and not self.has_flips:
            raise UserError(f"the cache {self.path} has no mirrored latents: build it with views.flip=true")
        views = np.zeros(len(indices), np.int64) if flipped is None else np.asarray(flipped, dtype=np.int64)
        rows = self._mapped_rows(indices, views) if self._rows is None else self._preloaded_rows(indices, views)
        rows = rows.float().view(-1, *self._layout.shape)
        latents = DiagonalGaussian(rows).sample(generator, noise) if self.has_moments else rows
        return latents, torch.from_numpy(self._labels[indices]).to(latents.device)

    def _mapped_rows(self, indices: np.ndarray, views: np.ndarray) -> Tensor:
        """Stored rows float16 [n, K h w]: the bytes of each, joined, which for rows of kilobytes is memory speed."""
        if not len(indices):
            return torch.empty(0, int(np.prod(self._layout.shape)), dtype=torch.float16)
        numbers, places = np.divmod(indices, self.manifest["samples_per_shard"])
        memory = {number: self.shard(number).memory for number in set(numbers.tolist())}
        starts = self._layout.row_starts(places, views)
        stops = starts + self._layout.row_bytes
        where = zip(numbers.tolist(), starts.tolist(), stops.tolist(), strict=True)
        rows = bytearray().join([memory[number][start:stop] for number, start, stop in where])
        return torch.frombuffer(rows, dtype=torch.float16).view(len(indices), -1)

    def _preloaded_rows(self, indices: np.ndarray, views: np.ndarray) -> Tensor:
        """Stored rows float16 [n, K h w] on the device of the pre-loaded ones."""
        where = torch.from_numpy(indices * self._rows.shape[1] + views).to(self._rows.device)
        return self._rows.flatten(0, 1).index_select(0, where)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of all samples in an epoch, a function of (seed, epoch): int64 [len(ds)]."""
        return random_state("epoch order", seed, epoch).permutation(len(self))

    def _order(self, seed: int, epoch: int, batch_size: int) -> np.ndarray:
        return self.epoch_order(seed, epoch)

    def batches(
        self, batch_size: int, seed: int = 0, start_step: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Endless training batches of this process: (latents float32 [b, C, h, w], labels [b], indices [b]).

        batch_size counts all processes together; process `rank` gets rows [rank b, (rank + 1) b) of every batch, so all
        have equally many steps. Every epoch has a new order; the rest after its last whole batch is dropped, and a set
        smaller than a batch is repeated to fill it. Flips (half of the time, where stored) and posterior samples are
        drawn for the whole batch, so nothing depends on `world`. Begins at `start_step`; without it, once after
        `load_state_dict`, where that state points to, and else at the first step.
        """
        return self._sequence.run(self.read, batch_size, seed, start_step, rank, world)

    def steps(
        self, batch_size: int, seed: int = 0, start_step: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Step]:
        """What `batches` of the same arguments would read, without noise, for data that accompanies the latents."""
        return self._sequence.steps(batch_size, seed, start_step, rank, world)

    def read(self, step: Step) -> Batch:
        """The batch of one step."""
        latents, labels = self.gather(step.indices, noise=step.noise, flipped=step.flipped)
        return latents, labels, torch.from_numpy(step.indices)

    def state_dict(self) -> dict:
        """Where the newest iterator of `batches` stands: {"seed", "epoch", "position"}, in samples of all processes."""
        return dict(self._sequence.state)

    def load_state_dict(self, state: dict) -> None:
        """Let the next `batches` continue there, with any number of processes."""
        self._sequence.load(state)
