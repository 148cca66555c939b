"""Images as training and evaluation batches: the order of samples, and the processes that decode them.

What a training batch contains is a function of (seed, epoch, sample index) alone, so batches do not depend on worker
count, process count or where training was resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.random import random_state
from ssdd.images.dataset import ImageDataset, Key
from ssdd.images.pixels import from_uint8
from ssdd.images.sources import DatasetConfig, open_source
from ssdd.images.workers import read_by_workers


def steps_per_epoch(dataset: ImageDataset, batch_size: int) -> int:
    """Whole batches in an epoch; 1 when the set is smaller than a batch."""
    return max(1, len(dataset) // batch_size)


def train_batches(
    dataset: ImageDataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Endless training batches of this process, from step `start_step` on.

    batch_size counts all processes together and must be divisible by `world`; rank r gets rows [r b, (r + 1) b).
    Samples come in a new order every epoch, drawn from (seed, epoch); the rest after the last whole batch is dropped,
    a set smaller than a batch is repeated to fill it. Yields (images float32 [b, 3, H, W] in [-1, 1], labels int64 [b],
    indices int64 [b], epoch).
    """
    if batch_size < 1 or batch_size % world:
        raise UserError(f"dataset.batch_size={batch_size} can't be divided over {world} processes")
    own = batch_size // world
    steps = steps_per_epoch(dataset, batch_size)

    def keys() -> Iterator[list[Key]]:
        epoch, step = divmod(start_step, steps)
        while True:
            order = random_state("epoch order", seed, epoch).permutation(len(dataset))
            order = np.resize(order, steps * batch_size)  # repeats the order of a set smaller than a batch
            for first in range(step * batch_size, steps * batch_size, batch_size):
                rows = order[first + rank * own : first + (rank + 1) * own]
                yield [(epoch, index) for index in rows.tolist()]
            epoch, step = epoch + 1, 0

    for asked, pixels, labels, indices in read_batches(dataset, keys(), workers):
        _count_skipped(dataset, asked, indices)
        yield from_uint8(pixels), labels, indices, asked[0][0]


def eval_batches(
    dataset: ImageDataset, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every sample of this process once, in order: indices rank, rank + world, ... in batches of `batch_size`.

    Nothing is dropped, padded or doubled over the processes together; skipped images are missing from their batch.
    Yields (pixels uint8 [b, 3, H, W], labels int64 [b], indices int64 [b]).
    """
    own = range(rank, len(dataset), world)
    keys = ([(0, i) for i in own[first : first + batch_size]] for first in range(0, len(own), batch_size))
    for asked, pixels, labels, indices in read_batches(dataset, keys, workers):
        readable = _count_skipped(dataset, asked, indices)
        if readable.any():
            yield pixels[readable], labels[readable], indices[readable]


def read_split(cfg: DatasetConfig, split: str) -> tuple[Tensor, Tensor, int]:
    """All images of a split as evaluation sees them, uint8 [n, 3, s, s], labels [n], and the number of classes."""
    dataset = ImageDataset(open_source(cfg, split), cfg, train=False)
    parts = [(pixels, labels) for pixels, labels, _ in eval_batches(dataset, 256, workers=cfg.reading_processes)]
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return images, labels, len(dataset.source.class_names)


def _count_skipped(dataset: ImageDataset, asked: list[Key], indices: Tensor) -> Tensor:
    """Report the requested images that another one replaces; bool [b], true where the image is the requested one."""
    readable = indices == torch.tensor([index for _, index in asked])
    for place in torch.nonzero(~readable).flatten().tolist():
        dataset.report_skipped(asked[place][1])
    return readable


Rows = tuple[list[Key], Tensor, Tensor, Tensor]


def read_batches(dataset: ImageDataset, keys: Iterable[list[Key]], workers: int) -> Iterator[Rows]:
    """Decode batch after batch, here or in worker processes: (keys, uint8 [b, 3, H, W], labels [b], indices [b])."""
    if workers == 0:
        batches: Iterable[Rows | UserError] = map(_BatchReader(dataset).__getitem__, keys)
    else:
        row = 3 * dataset.cfg.im_size**2
        batches = read_by_workers(_BatchReader(dataset), keys, workers, lambda batch: len(batch) * row)
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _BatchReader(torch.utils.data.Dataset):
    """Reads a whole batch by its keys. Hands a UserError back as a value: raised in a worker, torch would wrap it."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, keys: list[Key]) -> Rows | UserError:
        try:
            read = {key: self.dataset[key] for key in dict.fromkeys(keys)}  # a filled-up batch has its last image often
            pixels, labels, indices = zip(*(read[key] for key in keys), strict=True)
        except UserError as problem:
            return problem
        return keys, torch.stack(pixels), torch.tensor(labels), torch.tensor(indices)
