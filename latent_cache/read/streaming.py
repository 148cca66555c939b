"""Read a cache from object storage, a web server or a slow disk, through fsspec and a local copy of its shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_cache.read.batches import Batch, BatchSequence, Step
from latent_cache.read.dataset import Indices, LatentDataset
from latent_cache.read.shard_copies import ShardFetcher
from latent_cache.read.shard_order import ShardOrder
from ssdd.engine.errors import UserError
from ssdd.engine.remote import RemoteFolder


@dataclass(frozen=True)
class Download:
    """How shards are downloaded."""

    cache_bytes: int | None = None
    """Most that the split's shards may take in `cache_dir`, for all processes of the machine; None keeps all."""
    threads: int = 4
    """Shards that a process downloads at the same time."""
    storage_options: dict[str, Any] | None = None
    """Keyword arguments of the fsspec file system."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UserError(f"threads={self.threads}: expected a positive number")


class StreamingLatents(torch.utils.data.IterableDataset):
    """One split of the cache at `url`, whose shards are downloaded whole, ahead of their use, into `cache_dir`.

    `batches`, `gather`, `state_dict` and the attributes are those of `LatentDataset`, and so are the values. Iterating
    gives the samples of an epoch, (latent float32 [C, h, w], label, index), split over processes and DataLoader
    workers, each of which gets equally many. Workers know neither of earlier epochs, for which there is `set_epoch`,
    nor of each other's `state_dict`. `batches` is several times as fast and needs no workers.

    url: any that fsspec knows, or a path. seed: of the order when iterating. order, download: their defaults if None.
    fingerprint: as in `LatentDataset`. UserError for anything that is wrong, also in mid-epoch when a shard can't be
    fetched.
    """

    def __init__(
        self,
        url: str,
        split: str = "train",
        *,
        cache_dir: str | Path,
        seed: int = 0,
        order: ShardOrder | None = None,
        download: Download | None = None,
        fingerprint: str | None = None,
    ) -> None:
        order, download = order or ShardOrder(), download or Download()
        remote = RemoteFolder(url, download.storage_options)
        self._fetcher = ShardFetcher(remote, Path(cache_dir), split, download.cache_bytes, download.threads)
        self._local = LatentDataset(cache_dir, split, verify="none", fingerprint=fingerprint)
        self.url, self.seed, self.order = url, seed, order
        self.manifest, self.norm, self.class_names = self._local.manifest, self._local.norm, self._local.class_names
        self.has_flips, self.has_moments = self._local.has_flips, self._local.has_moments
        self.latent_shape, self.num_classes = self._local.latent_shape, self._local.num_classes
        self._sequence = BatchSequence(self._local, self._samples_in_order, order.arrangement)
        self._next_epoch = 0

    def gather(
        self,
        indices: Indices,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        flipped: Indices | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `LatentDataset.gather`; downloads the shards that it needs one after the other."""
        indices = np.asarray(indices, dtype=np.int64)
        for number in np.unique(indices // self.manifest["samples_per_shard"]).tolist():
            if 0 <= number < len(self._local.shard_samples):
                self._map(number)
        return self._local.gather(indices, generator, noise, flipped)

    def batches(
        self, batch_size: int, seed: int = 0, start_step: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """As `LatentDataset.batches`, in the order of this reader."""
        plan: _Plan | None = None

        def read(step: Step) -> Batch:
            nonlocal plan
            if step.number == 0:
                following = self._sequence.schedule(batch_size, seed, step.epoch + 1, 0, rank, world)
                plan = self._planned(step.schedule, following)
            self._provide(plan, step.number)
            return self._local.read(step)

        return self._sequence.run(read, batch_size, seed, start_step, rank, world)

    def steps(
        self, batch_size: int, seed: int = 0, start_step: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Step]:
        """As `LatentDataset.steps`, in the order of this reader."""
        return self._sequence.steps(batch_size, seed, start_step, rank, world)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of `epoch`; without it, one iteration follows the other."""
        self._next_epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        worker = torch.utils.data.get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        # A step takes one sample for every worker of every process.
        shares = world * workers
        start = None if self._sequence.resumes else self._next_epoch * max(len(self._local) // shares, 1)
        for latents, labels, indices in self.batches(shares, self.seed, start, rank * workers + own, shares):
            state = self._sequence.state
            self._next_epoch = state["epoch"] + 1
            yield latents[0], int(labels[0]), int(indices[0])
            if state["position"] + shares > len(self._local):
                return

    def state_dict(self) -> dict:
        """Where the newest iterator stands, in samples of all processes."""
        return dict(self._sequence.state)

    def load_state_dict(self, state: dict) -> None:
        """Let the next `batches`, or iteration, continue there, with any number of processes."""
        self._sequence.load(state)

    def _samples_in_order(self, seed: int, epoch: int, batch_size: int) -> np.ndarray:
        return self.order.samples(self._local.shard_samples, seed, epoch, batch_size)

    def _planned(self, schedule: np.ndarray, following: np.ndarray) -> _Plan:
        per_shard = self.manifest["samples_per_shard"]
        plan = _Plan(schedule // per_shard, following // per_shard, len(self._local.shard_samples))
        plan.ahead = self.order.window
        if self._fetcher.limit is not None:
            largest = max(entry["bytes"] for entry in self._fetcher.entries)
            room = self._fetcher.limit // largest
            if room < plan.together:
                raise UserError(
                    f"cache_bytes={self._fetcher.limit} can't hold the {plan.together} shards that are read together "
                    f"({plan.together * largest} bytes): raise it, or lower window={self.order.window}"
                )
            plan.ahead = min(plan.ahead, room - plan.together)
        return plan

    def _provide(self, plan: _Plan, step: int) -> None:
        """Map the shards of a step; when one of them is new, release the old ones and request the next ones."""
        needed = plan.needed(step)
        new = [number for number in needed if not self._local.is_mapped(number)]
        if not new:
            return
        in_use, upcoming = plan.at(step)
        for number in set(range(len(self._local.shard_samples))) - set(in_use):
            self._local.release(number)
        self._fetcher.want([*new, *(n for n in in_use if n not in new), *upcoming])
        for number in new:
            self._map(number)

    def _map(self, number: int) -> None:
        """Wait for a shard and map it; again, if another process makes room by deleting it in between."""
        while not self._local.is_mapped(number):
            self._fetcher.wait(number)
            try:
                self._local.shard(number)
            except (UserError, FileNotFoundError):
                if self._fetcher.is_here(number):
                    raise


class _Plan:
    """When a process needs which shards, in the rest of an epoch and at the beginning of the following one."""

    def __init__(self, shards: np.ndarray, following: np.ndarray, count: int) -> None:
        self.shards = shards  # int [steps, b], the shard of every sample
        self.first, self.last = np.full(count, len(shards)), np.full(count, -1)
        number_of_step = np.repeat(np.arange(len(shards)), shards.shape[1])
        np.minimum.at(self.first, shards.reshape(-1), number_of_step)
        np.maximum.at(self.last, shards.reshape(-1), number_of_step)
        used = np.flatnonzero(self.last >= 0)
        self.by_first_use = used[np.argsort(self.first[used], kind="stable")]
        _, at = np.unique(following, return_index=True)
        self.next_epoch = following.reshape(-1)[np.sort(at)]
        change = np.bincount(self.first[used], minlength=len(shards) + 1)
        change -= np.bincount(self.last[used] + 1, minlength=len(shards) + 1)
        self.together = int(np.cumsum(change).max())
        self.ahead = 0

    def needed(self, step: int) -> list[int]:
        return np.unique(self.shards[step]).tolist()

    def at(self, step: int) -> tuple[list[int], list[int]]:
        """The shards that are in use in this step, and those to download next."""
        in_use = np.flatnonzero((self.first <= step) & (self.last >= step)).tolist()
        upcoming = [*self.by_first_use[self.first[self.by_first_use] > step].tolist(), *self.next_epoch.tolist()]
        return in_use, list(dict.fromkeys(n for n in upcoming if n not in in_use))[: self.ahead]
