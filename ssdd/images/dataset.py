"""Square uint8 images of a source, cropped and mirrored for training or cropped for evaluation.

What a training image looks like is a function of (seed, epoch, sample index) alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.random import seed_of
from ssdd.images.crops import CROPS, resize_short_side
from ssdd.images.sources import DatasetConfig, ImageSource

log = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20  # decoded images of a set up to this size stay in memory
Key = tuple[int, int]  # (epoch, sample index)


class ImageDataset:
    """Square uint8 images of a source, cropped for training (train=True) or for evaluation.

    ds[i] or ds[epoch, i] gives (uint8 [3, im_size, im_size], label, index). The training crop and flip are drawn from
    (seed, epoch, i). An unreadable image raises UserError; with on_corrupt=skip the next readable one replaces
    it, with its own label and index: a returned index that is not the requested one means "skipped".
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
        """Images skipped so far: sample index -> where it lies (filled by the batch iterators)."""
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

    def pixels(self, indices: Iterable[int]) -> Tensor:
        """These images, uint8 [n, 3, im_size, im_size], in their order; an unreadable one as by `ds[i]`."""
        return torch.stack([self[index][0] for index in indices])

    def report_skipped(self, index: int) -> None:
        """Count an unreadable image that was skipped; logs its place the first time."""
        if index not in self.corrupt:
            self.corrupt[index] = self.source.where(index)
            log.warning("skipped unreadable image %s (%d so far)", self.corrupt[index], len(self.corrupt))

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
            else:
                image = CROPS[self.cfg.crop](image, size)
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
