"""MAR: a tree like an image folder's, with one .npz file per image.

    CLASS/NUMBER.npz  moments, moments_flip: float32 (2C, h, w), raw: means, then log variances

Classes are the sorted names of the folders.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from latent_cache.peers.exchange import Block, PeerFormat, Samples
from ssdd.model.latent import LatentNorm


def class_folders(class_names: list[str]) -> list[str]:
    """Folder of each class: its name, or its number where names are not file names or don't sort as the classes do."""
    usable = all(name and name[0] != "." and not set(name) & set("/\\\0") for name in class_names)
    if usable and class_names == sorted(set(class_names)):
        return class_names
    return [f"{label:04d}" for label in range(len(class_names))]


def names(samples: Samples) -> list[str]:
    folders = class_folders(samples.class_names)
    return [f"{folders[label]}/{i:09d}.npz" for i, label in zip(samples.indices, samples.labels, strict=True)]


def size(shape: tuple[int, int, int], count: int) -> int:
    """Bytes of `count` latents (C, h, w) with both views."""
    return count * len(_npz(*np.zeros((2, 2 * shape[0], *shape[1:]), np.float32)))


def write(paths: list[Path], block: Block, seed: int) -> None:
    views = block.means.shape[1]
    for path, *moments in zip(paths, block.moments(0).numpy(), block.moments(views - 1).numpy(), strict=True):
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(_npz(*moments))
        os.replace(temporary, path)


def finish(folder: Path, labels: np.ndarray, class_names: list[str], norm: LatentNorm) -> None:
    """A folder for classes without samples too: its loader numbers the classes by the folders."""
    for name in class_folders(class_names):
        (folder / name).mkdir(exist_ok=True)


def _npz(moments: np.ndarray, mirrored: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, moments=moments, moments_flip=mirrored)
    return file.getvalue()


FORMAT = PeerFormat(
    project="MAR",
    holds="raw means and log variances of both views",
    block=256,
    names=names,
    size=size,
    write=write,
    finish=finish,
    both_views=True,
    posteriors=True,
)
