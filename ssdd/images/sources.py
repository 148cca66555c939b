"""Where images and their labels come from: scikit-learn digits, Fashion-MNIST, a folder of files, or shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular, other_kind
from ssdd.engine.random import random_state
from ssdd.images.crops import CROPS
from ssdd.images.shards import open_shards
from ssdd.images.small_sets import read_digits, read_fashion_mnist
from ssdd.images.stored_files import IMAGE_SUFFIXES, ImageFiles, decode_rgb

SPLITS = ("train", "val")


@dataclass
class DatasetConfig:
    source: str = field(default="imagefolder", metadata={"choices": lambda: SOURCES})
    """Where images come from: digits (scikit-learn, no download), fashion_mnist (IDX files), a folder, or shards."""
    root: str | None = None
    """Folder of the source; for imagefolder it takes precedence over imagenet_root, for fashion_mnist over the usual
    places.

    For webdataset a folder or URL (s3://, https://, ...) with train/*.tar and val/*.tar, or a pattern of shards as
    URL/{train-{0000..1023},val-{00..63}}.tar. Samples: KEY.jpg|jpeg|png|webp with KEY.cls, or KEY.json with "label".
    """
    cache_dir: str | None = None
    """webdataset: folder for copies of remote shards and for indices; null: ~/.cache/ssdd/shards."""
    imagenet_root: str = "imagenet_data"
    """Image folder in ImageNet layout, ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg; used when root is not set."""
    im_size: int = 128
    """Side of the square images, in pixels."""
    batch_size: int = 256
    """Images per step, over all processes."""
    aug_scale: float | None = None
    """Training: resize the short side to a random length in [im_size, aug_scale * im_size) before the random crop."""
    limit: int | None = None
    """Use only this many images of each split, the same ones every time, spread over the classes as evenly as
    possible."""
    flip: bool | None = None
    """Mirror half of the training images; null: if the source allows it (not digits and Fashion-MNIST)."""
    crop: str = field(default="resize", metadata={"choices": CROPS})
    """Test-time crop: resize (bilinear short side, centre crop; the paper's) or adm (box halving, bicubic; gFID's)."""
    workers: int | None = None
    """Processes that decode images; 0: the training process itself; null: one per core, up to 8, for files and
    shards, else 0. The batches are the same for any number."""
    on_corrupt: str = field(default="error", metadata={"choices": ("error", "skip")})
    """An unreadable image file: stop with its path (error), or skip and count it (skip)."""

    @property
    def reading_processes(self) -> int:
        """`workers`, with null replaced."""
        if self.workers is None:
            return min(8, os.cpu_count() or 1) if SOURCES[self.source].decodes else 0
        return self.workers


class Pictures(Protocol):
    """The pictures of a split by number."""

    def read(self, index: int) -> Image.Image:
        """The picture as PIL RGB, at its stored size. UserError with its place when it can't be read."""

    def where(self, index: int) -> str:
        """Where it lies; "" where nothing more than source, split and number is known."""

    def subset(self, indices: np.ndarray) -> Pictures:
        """These pictures alone, in this order."""

    def add_to(self, digest: hashlib._Hash) -> None:
        """Update a fingerprint with the pictures, whatever place they lie in."""


@dataclass(frozen=True)
class Source:
    """An entry of `SOURCES`: one kind of place that images come from."""

    read: Callable[[DatasetConfig, str], tuple[Pictures, np.ndarray, list[str]]]
    """Pictures of a split ("train" or "val"), their labels int64 [n], class names; UserError when it is malformed."""
    flip: bool
    """Whether a mirror image is a valid image, unless dataset.flip says otherwise."""
    decodes: bool = True
    """Whether reading an image is work, which processes of their own do by default; false for sets in memory."""
    root: str | None = None
    """What dataset.root, which must be set, is; None where it may be left out."""


@dataclass
class ImageSource:
    """One split of labelled RGB images.

    name: source name; split: train or val; labels: int64 [n]; class_names: one name per class;
    flip: whether a mirror image is a valid image; pictures: reads image number i.
    """

    name: str
    split: str
    labels: np.ndarray
    class_names: list[str]
    flip: bool
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Decode image `index` as PIL RGB, at its stored size. UserError with the path when it can't be read."""
        return self.pictures.read(index)

    def where(self, index: int) -> str:
        """Describe where picture `index` is: a path for files, else source, split and number."""
        return self.pictures.where(index) or f"{self.name} {self.split} image {index}"

    def fingerprint(self) -> str:
        """Hex sha256 of what the source holds: labels, class names, order and pictures, not where it lies.

        Pictures are read for the first call alone.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.name, self.split, *self.class_names):
            digest.update(part.encode(errors="surrogateescape") + b"\0")
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        self.pictures.add_to(digest)
        return digest.hexdigest()


def open_source(cfg: DatasetConfig, split: str) -> ImageSource:
    """Open one split ("train" or "val") of the configured source; UserError when it is missing or malformed."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if cfg.limit is not None and cfg.limit < 1:
        raise UserError(f"dataset.limit={cfg.limit}: expected a positive number of images, or null for all")
    if cfg.source not in SOURCES:
        raise UserError(f"dataset.source={cfg.source}: expected one of {', '.join(SOURCES)}")
    source = SOURCES[cfg.source]
    if source.root is not None and not cfg.root:
        raise UserError(f"dataset.source={cfg.source} needs dataset.root={source.root}")
    pictures, labels, class_names = source.read(cfg, split)
    if cfg.limit is not None and cfg.limit < len(labels):
        chosen = balanced_order(labels)[: cfg.limit]
        pictures, labels = pictures.subset(chosen), labels[chosen]
    flip = source.flip if cfg.flip is None else cfg.flip
    return ImageSource(cfg.source, split, labels, class_names, flip, pictures)


def balanced_order(labels: np.ndarray) -> np.ndarray:
    """A fixed order of all samples whose every beginning is as balanced over the classes as they allow.

    Each round takes one random sample of every class that still has one. int64 [n], a function of `labels` alone.
    """
    draw = random_state("balanced order")
    order = draw.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class], side="left")
    rounds = np.arange(len(labels)) - starts  # how many samples of its class come before each
    shuffled = draw.permutation(len(labels))
    return by_class[shuffled][np.argsort(rounds[shuffled], kind="stable")].astype(np.int64)


def _read_folder(cfg: DatasetConfig, split: str) -> tuple[ImageFiles, np.ndarray, list[str]]:
    return _image_folder(Path(cfg.root or cfg.imagenet_root), split, check=cfg.on_corrupt == "error")


def _image_folder(root: Path, split: str, check: bool) -> tuple[ImageFiles, np.ndarray, list[str]]:
    """Files of ROOT/SPLIT/CLASS/, classes numbered in the sorted order of their names over both splits.

    check: UserError at once for what has an image's name and is not a file; else it is an unreadable image.
    """
    layout = f"expected {root}/train/CLASS/*.png and {root}/val/CLASS/*.png (also {', '.join(IMAGE_SUFFIXES[1:])})"
    if not (root / split).is_dir():
        missing = root / split if root.is_dir() else root
        raise UserError(f"no image folder at {missing}: {layout}. Set dataset.root=DIR (or dataset.imagenet_root=DIR)")
    class_names = sorted({entry.name for s in SPLITS if (root / s).is_dir() for entry in _folders(root / s)})
    names: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        folder = root / split / class_name
        if not folder.is_dir():
            continue
        entries = [entry for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_SUFFIXES)]
        for entry in entries:
            if check and not entry.is_file(follow_symlinks=False) and other_kind(entry.path):
                decode_rgb(Path(entry.path), entry.path)  # says what it is
        files = sorted(entry.name for entry in entries)
        names.extend(f"{split}/{class_name}/{name}" for name in files)
        labels.extend([label] * len(files))
    if not names:
        raise UserError(f"no images in {root / split}: {layout}")
    return ImageFiles(root, names), np.array(labels, dtype=np.int64), class_names


def _folders(path: Path) -> list[os.DirEntry[str]]:
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_symlink() and "link" in (other_kind(entry.path) or ""):  # of a class, which would go missing
            check_regular(entry.path)
    return [entry for entry in entries if entry.is_dir()]


SOURCES = {
    "digits": Source(lambda cfg, split: read_digits(split, cfg.im_size), flip=False, decodes=False),
    "fashion_mnist": Source(lambda cfg, split: read_fashion_mnist(cfg.root, split), flip=False, decodes=False),
    "imagefolder": Source(_read_folder, flip=True),
    "webdataset": Source(
        lambda cfg, split: open_shards(cfg.root, split, cfg.cache_dir), flip=True, root="FOLDER_OR_URL of the shards"
    ),
}
"""Every value of dataset.source; a source is added here alone."""
