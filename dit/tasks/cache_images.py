"""The images of a cache: what its latents were encoded from, found by sample index."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from latent_cache import LatentDataset, StreamingLatents
from ssdd.engine.errors import UserError
from ssdd.images.batches import read_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8
from ssdd.images.sources import DatasetConfig, ImageSource, open_source

DESCRIBED = ("source", "im_size", "crop")


def source_of(cfg: DatasetConfig, cache: LatentDataset | StreamingLatents) -> ImageSource:
    """The train split that a cache was built from.

    UserError, before any image is read, when the keys of `dataset` describe other images than the manifest does, or the
    manifest records none, as for an imported cache.
    """
    recorded, entry = cache.manifest["dataset"], cache.manifest["splits"]["train"]
    if (peer := cache.manifest["encoding"].get("imported_from")) is not None:
        raise UserError(
            f"the cache was imported from {peer}, and its images are not known: set losses.repa=0 "
            "and training.fidelity_every=0, or build a cache of the images"
        )
    wrong = [key for key in DESCRIBED if getattr(cfg, key) != recorded[key]]
    if wrong:
        wanted = " ".join(f"dataset.{key}={recorded[key]}" for key in wrong)
        given = " ".join(f"dataset.{key}={getattr(cfg, key)}" for key in wrong)
        raise UserError(f"the cache was built from other images than {given}: set {wanted}")
    source = open_source(cfg, "train")
    if source.fingerprint() != entry["fingerprint"]:
        raise UserError(
            f"the {len(source)} images of dataset.source={cfg.source} are not the {entry['count']} that the cache "
            "was built from (their fingerprint differs): give the dataset.root and dataset.limit of the build"
        )
    return source


class CacheImages:
    """The train split's images of a cache, resized and cropped as its encoder saw them. UserError as `source_of`."""

    def __init__(self, cfg: DatasetConfig, cache: LatentDataset | StreamingLatents):
        source, skipped = source_of(cfg, cache), cache.manifest["splits"]["train"]["skipped"]
        self.cache, self.workers = cache, cfg.reading_processes
        self.dataset = ImageDataset(source, replace(cfg, on_corrupt="error"), train=False)
        self.numbers = np.setdiff1d(np.arange(len(source)), skipped)  # sample of the cache -> of the source

    def batches(
        self, batch_size: int, seed: int = 0, start_step: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Tensor]:
        """The images of `cache.batches(...)`, mirrored where its latents are: float32 [b, 3, H, W] in [-1, 1]."""
        flips: deque[Tensor | None] = deque()  # of the batches that are being read

        def keys() -> Iterator[list[tuple[int, int]]]:
            for step in self.cache.steps(batch_size, seed, start_step, rank, world):
                flips.append(step.flipped)
                yield [(0, number) for number in self.numbers[step.indices].tolist()]

        for _, pixels, _, _ in read_batches(self.dataset, keys(), self.workers):
            images, flipped = from_uint8(pixels), flips.popleft()
            yield images if flipped is None else torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
