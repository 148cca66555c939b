"""MAR: a tree like an image folder's, with one .npz file per image.

    CLASS/NUMBER.npz  moments, moments_flip: float32 (2C, h, w), raw: means, then log variances

Classes are the sorted names of the folders.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from latent_cache.peers.exchange import Block

BLOCK = 256


def class_folders(class_names: list[str]) -> list[str]:
    """Folder of each class: its name, or its number where names are not file names or don't sort as the classes do."""
    usable = all(name and name[0] != "." and not set(name) & set("/\\\0") for name in class_names)
    if usable and class_names == sorted(set(class_names)):
        return class_names
    return [f"{label:04d}" for label in range(len(class_names))]


def prepare(folder: Path, class_names: list[str]) -> None:
    for name in class_folders(class_names):
        (folder / name).mkdir(exist_ok=True)


def names(block: range, labels: np.ndarray, class_names: list[str]) -> list[str]:
    folders = class_folders(class_names)
    return [f"{folders[label]}/{index:09d}.npz" for index, label in zip(block, labels, strict=True)]


def size(shape: tuple[int, int, int], count: int) -> int:
    """Bytes of `count` latents (C, h, w) with both views."""
    return count * len(_npz(*np.zeros((2, 2 * shape[0], *shape[1:]), np.float32)))


def write(folder: Path, block: Block, class_names: list[str], seed: int) -> None:
    views = block.means.shape[1]
    plain, mirrored = block.moments(0).numpy(), block.moments(views - 1).numpy()
    files = names(block.indices.tolist(), block.labels, class_names)
    for name, *moments in zip(files, plain, mirrored, strict=True):
        temporary = (folder / name).with_suffix(".tmp")
        temporary.write_bytes(_npz(*moments))
        os.replace(temporary, folder / name)


def finish(folder: Path, labels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Nothing but the files of the samples."""


def _npz(moments: np.ndarray, mirrored: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, moments=moments, moments_flip=mirrored)
    return file.getvalue()
