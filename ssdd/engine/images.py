"""Images as training and evaluation batches: resizing, cropping, mirroring, and the order of samples.

What a training batch contains is a function of (seed, epoch, sample index) alone, so batches do not depend on worker
count, process count or where training was resumed. Resizing is that of the paper (facts f) or of ADM (facts 1.1).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.noise import seed_of
from ssdd.engine.pictures import from_uint8, to_uint8
from ssdd.engine.sources import DatasetConfig, ImageSource, open_source, random_state
from ssdd.engine.workers import read_by_workers

__all__ = [
    "DatasetConfig", "ImageDataset", "ImageSource", "eval_batches", "open_source", "read_batches", "read_split",
    "steps_per_epoch", "train_batches",
]  # fmt: skip

KEPT_BYTES = 256 << 20  # decoded images of a set up to this size stay in memory
Key = tuple[int, int]  # (epoch, sample index)

log = logging.getLogger(__name__)


def resize_short_side(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resize so that the shorter side is `size` pixels, keeping the aspect ratio (rounded down, as torchvision)."""
    width, height = image.size
    shorter = min(width, height)
    return image.resize((size * width // shorter, size * height // shorter), resample)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop of ADM and DiT: halve with a box filter while possible, bicubic to `size`, centre crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageDataset:
    """Square uint8 images of a source, cropped for training (train=True) or for evaluation.

    ds[i] or ds[epoch, i] gives (uint8 [3, im_size, im_size], label, index). The training crop and flip are drawn from
    (seed, epoch, i). An unreadable image raises UserError; with on_corrupt=skip the next readable one stands in for
    it, with its own label and index: a returned index that is not the one asked for means "skipped".
    """

    def __init__(self, source: ImageSource, cfg: DatasetConfig, train: bool, seed: int = 0) -> None:
        if cfg.im_size < 1:
            raise UserError(f"dataset.im_size={cfg.im_size}: expected a positive number of pixels")
        if cfg.aug_scale is not None and cfg.aug_scale < 1:
            raise UserError(f"dataset.aug_scale={cfg.aug_scale}: expected a number >= 1, or null for no scaling")
        self.source = source
        self.cfg = cfg
        self.train = train
        self.seed = seed
        self.corrupt: dict[int, str] = {}
        """Images left out so far: sample index -> where it lies (filled by the batch iterators)."""
        self._random_scale = train and cfg.aug_scale is not None
        self._keep = not self._random_scale and len(source) * 3 * cfg.im_size**2 <= KEPT_BYTES
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, int, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.cfg.on_corrupt == "error":
            return self._sample(int(epoch), int(index))
        for step in range(len(self)):
            try:
                return self._sample(int(epoch), (int(index) + step) % len(self))
            except UserError:
                continue
        raise UserError(f"none of the {len(self)} images of {self.source.name} {self.source.split} can be read")

    def report_skipped(self, index: int) -> None:
        """Count an unreadable image that was left out; logs its place the first time."""
        if index not in self.corrupt:
            self.corrupt[index] = self.source.where(index)
            log.warning("left out unreadable image %s (%d so far)", self.corrupt[index], len(self.corrupt))

    def _sample(self, epoch: int, index: int) -> tuple[Tensor, int, int]:
        pixels = self._training_pixels(epoch, index) if self.train else self._resized(index, self.cfg.im_size)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), int(self.source.labels[index]), index

    def _resized(self, index: int, size: int) -> np.ndarray:
        """uint8 [h, w, 3]: cropped for evaluation; for training still to be cropped, short side `size`."""
        pixels = self._kept.get(index)
        if pixels is None:
            image = self.source.image(index)
            if self.train:
                image = resize_short_side(image, size, Image.Resampling.LANCZOS)
            elif self.cfg.crop == "adm":
                image = adm_crop(image, size)
            else:
                image = centre_crop(resize_short_side(image, size, Image.Resampling.BILINEAR), size)
            pixels = np.asarray(image)
            if self._keep:
                self._kept[index] = pixels
        return pixels

    def _training_pixels(self, epoch: int, index: int) -> np.ndarray:
        draws = (seed_of("image", self.seed, epoch, index, use) for use in ("scale", "down", "right", "mirror"))
        scale, down, right, mirror = ((draw >> 10) / 2**53 for draw in draws)  # uniform in [0, 1)
        size = self.cfg.im_size
        lengths = max(1, int(size * self.cfg.aug_scale) - size) if self._random_scale else 1
        pixels = self._resized(index, size + int(scale * lengths))
        height, width, _ = pixels.shape
        top, left = int(down * (height - size + 1)), int(right * (width - size + 1))
        pixels = pixels[top : top + size, left : left + size]
        return pixels[:, ::-1] if self.source.flip and mirror < 0.5 else pixels


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
    Yields (images float32 [b, 3, H, W] in [-1, 1], labels int64 [b], indices int64 [b]).
    """
    own = range(rank, len(dataset), world)
    keys = ([(0, i) for i in own[first : first + batch_size]] for first in range(0, len(own), batch_size))
    for asked, pixels, labels, indices in read_batches(dataset, keys, workers):
        readable = _count_skipped(dataset, asked, indices)
        if readable.any():
            yield from_uint8(pixels[readable]), labels[readable], indices[readable]


def read_split(cfg: DatasetConfig, split: str) -> tuple[Tensor, Tensor, int]:
    """All images of a split as evaluation sees them, uint8 [n, 3, s, s], labels [n], and the number of classes."""
    dataset = ImageDataset(open_source(cfg, split), cfg, train=False)
    parts = [(to_uint8(x), labels) for x, labels, _ in eval_batches(dataset, 256, workers=cfg.reading_processes)]
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return images, labels, len(dataset.source.class_names)


def _count_skipped(dataset: ImageDataset, asked: list[Key], indices: Tensor) -> Tensor:
    """Report the asked-for images that another one stands in for; bool [b], true where the image is the one asked."""
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
            pixels, labels, indices = zip(*(self.dataset[key] for key in keys), strict=True)
        except UserError as problem:
            return problem
        return keys, torch.stack(pixels), torch.tensor(labels), torch.tensor(indices)
