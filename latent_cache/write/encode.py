"""The one pass through the encoder: images to raw float32 rows in `.partial`, with their statistics.

The last bits of a latent depend on the batch it was encoded in. So the batches are fixed by sample index inside each
shard, the last one is filled up with copies of its last image, and every process computes with the same settings.
Shards are equal byte for byte on CPUs of one capability, which the manifest records, and equal to rounding on others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latent_cache.write.folder import CacheFolder, Job
from ssdd.engine.errors import UserError
from ssdd.engine.files import put, write_json
from ssdd.images.batches import read_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8
from ssdd.images.sources import DatasetConfig, ImageSource
from ssdd.model.channel_statistics import ChannelStatistics
from ssdd.model.tokenizer import SSDD


class ImageBatch(NamedTuple):
    """Samples first, first + 1, ... (`count` of them) of a split, by their numbers in the source, filled up."""

    job: Job
    first: int
    count: int
    numbers: list[int]


class ImagesToEncode:
    """Test-time images of all splits, read batch by batch; `skipped` are the unreadable ones of each split."""

    def __init__(self, cfg: DatasetConfig, sources: dict[str, ImageSource], skipped: dict[str, list[int]]) -> None:
        self.datasets = {
            split: ImageDataset(source, replace(cfg, on_corrupt="error"), train=False)
            for split, source in sources.items()
        }
        self.numbers = {
            split: np.setdiff1d(np.arange(len(source)), skipped[split]) for split, source in sources.items()
        }

    def labels(self, job: Job) -> np.ndarray:
        """Class labels of a shard: int64 [n]."""
        numbers = self.numbers[job.split][job.samples.start : job.samples.stop]
        return self.datasets[job.split].source.labels[numbers]

    def batches(self, jobs: list[Job], size: int) -> list[ImageBatch]:
        """The batches of these shards, in order."""
        found = []
        for job in jobs:
            for first in range(job.samples.start, job.samples.stop, size):
                numbers = self.numbers[job.split][first : min(first + size, job.samples.stop)].tolist()
                filled = numbers + numbers[-1:] * (size - len(numbers))
                found.append(ImageBatch(job, first, len(numbers), filled))
        return found

    def read(self, batches: list[ImageBatch], workers: int) -> Iterator[tuple[ImageBatch, Tensor]]:
        """Batches with their pixels, uint8 [size, 3, H, W], decoded here or in worker processes."""
        for split, batches_of_split in itertools.groupby(batches, key=lambda batch: batch.job.split):
            own = list(batches_of_split)
            keys = ([(0, number) for number in batch.numbers] for batch in own)
            for batch, (_, pixels, _, _) in zip(own, read_batches(self.datasets[split], keys, workers), strict=True):
                yield batch, pixels


def encode_shards(
    folder: CacheFolder,
    jobs: list[Job],
    tokenizer: SSDD,
    images: ImagesToEncode,
    workers: int,
    device: torch.device,
    progress: Callable[[int], object],
) -> None:
    """Write raw rows and statistics of the shards `jobs`; calls progress(n) after every n images."""
    batches = images.batches(jobs, folder.settings["encoding"]["batch_size"])
    shard: RawShard | None = None
    for batch, pixels in images.read(batches, workers):
        if shard is None or shard.job != batch.job:
            shard = RawShard(folder, batch.job)
        rows = raw_rows(tokenizer, pixels.to(device), folder.settings)[: batch.count]
        if not np.isfinite(rows).all():
            last = batch.first + batch.count - 1
            raise UserError(
                f"the encoder outputs non-finite values for {batch.job.split} samples {batch.first} to {last}: "
                "its weights are damaged or its training diverged; use another checkpoint"
            )
        shard.write(rows)
        progress(batch.count)
        if batch.first + batch.count == batch.job.samples.stop:
            shard.close()


@torch.no_grad()
def raw_rows(tokenizer: SSDD, pixels: Tensor, settings: dict) -> np.ndarray:
    """uint8 [B, 3, H, W] -> what is stored of each view, not yet normalised: float32 [B, view, K, h, w]."""
    images = from_uint8(pixels)
    views = [images, images.flip(-1)][: len(settings["views"])]
    rows = []
    for view in views:
        posterior = tokenizer.encode(view)
        moments = settings["content"] == "moments"
        rows.append(torch.cat([posterior.mean, posterior.logvar], 1) if moments else posterior.mean)
    return torch.stack(rows, 1).float().cpu().numpy()


class RawShard:
    """A .npy file float32 [n, view, K, h, w] that is written batch by batch, and its running statistics.

    Written with plain writes, not through a memory map, where a full disk would end the process with a signal.
    """

    def __init__(self, folder: CacheFolder, job: Job) -> None:
        self.folder, self.job = folder, job
        self._path = folder.temporary(job, ".npy")
        self._file = open(self._path, "wb")  # noqa: SIM115
        shape = (len(job.samples), len(folder.layout.views), *folder.layout.shape)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._statistics: list[ChannelStatistics] = []

    def write(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
        flat = rows.reshape(-1, *rows.shape[2:])
        self._statistics.append(ChannelStatistics.of(flat, self.folder.settings["content"]))

    def close(self) -> None:
        self._file.close()
        put(self._path, self.folder.raw(self.job))
        write_json(self.folder.raw_statistics(self.job), ChannelStatistics.merged(self._statistics).to_dict())
