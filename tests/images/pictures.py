"""Small sets of random pictures as every source has them, written into a folder."""

from __future__ import annotations

import gzip
import io
import itertools
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from ssdd.images.sources import DatasetConfig


def picture(value: int = 0) -> bytes:
    """A PNG file of 16 px in one colour."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 0, 90)).save(content, "png")
    return content.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 6, seed: int = 0) -> DatasetConfig:
    """root/train and root/val with `count` PNG files of 40 x 30 px a class."""
    random = np.random.RandomState(seed)
    for split, name, number in itertools.product(("train", "val"), classes, range(count)):
        path = root / split / name / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (30, 40, 3)).astype(np.uint8)).save(path)
    return DatasetConfig(source="imagefolder", root=str(root), im_size=16)


def write_shards(root: Path, count: int = 6, seed: int = 0) -> DatasetConfig:
    """root/train/0.tar and root/val/0.tar with `count` PNG files of each of two classes."""
    random = np.random.RandomState(seed)
    for split in ("train", "val"):
        members = {}
        for number in range(2 * count):
            members[f"{number:03d}.png"] = picture(random.randint(256))
            members[f"{number:03d}.cls"] = str(number % 2).encode()
        write_tar(root / split / "0.tar", members)
    return DatasetConfig(source="webdataset", root=str(root), im_size=16)


def write_fashion(folder: Path, split: str = "train", count: int = 5, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The two IDX files of a split; returns pixels [n, 28, 28] and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (count, 28, 28)).astype(np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    stem = "train" if split == "train" else "t10k"
    header = struct.pack(">4I", 0x803, count, 28, 28)
    (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    header = struct.pack(">2I", 0x801, count)
    (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return pixels, labels
