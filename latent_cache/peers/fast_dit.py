"""fast-DiT: one .npy file per latent and one per label, by number.

    imagenet256_features/{i}.npy  float32 (1, C, h, w): a posterior sample times 0.18215, about unit variance
    imagenet256_labels/{i}.npy    int64 (1,)

That code trains on the values as they are, so an export holds normalised latents. One view per image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from latent_cache.peers.exchange import Block, PeerLatents, checked_rows, npy_bytes, put_array, read_npy
from ssdd.engine.errors import UserError

FEATURES, LABELS = "imagenet256_features", "imagenet256_labels"
SCALING_FACTOR = 0.18215
BLOCK = 256


def prepare(folder: Path, class_names: list[str]) -> None:
    for name in (FEATURES, LABELS):
        (folder / name).mkdir(exist_ok=True)


def names(block: range, labels: np.ndarray, class_names: list[str]) -> list[str]:
    """Files of the samples `block`."""
    return [f"{name}/{index}.npy" for index in block for name in (FEATURES, LABELS)]


def size(shape: tuple[int, int, int], count: int) -> int:
    """Bytes of `count` latents (C, h, w)."""
    return count * (npy_bytes(*shape) + npy_bytes(1, itemsize=8))


def write(folder: Path, block: Block, class_names: list[str], seed: int) -> None:
    samples = block.samples(0, seed).numpy()
    for row, index in enumerate(block.indices):
        put_array(folder / LABELS / f"{index}.npy", block.labels[row : row + 1].astype(np.int64))
        put_array(folder / FEATURES / f"{index}.npy", samples[row : row + 1])


def finish(folder: Path, labels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Nothing but the files of the samples."""


def open_peer(folder: Path, divide: float) -> PeerLatents:
    """Values are divided by `divide`; numbers need not be without gaps, since one process of several may drop some."""
    found = sorted(int(path.stem) for path in (folder / FEATURES).glob("*.npy") if path.stem.isdecimal())
    if not found:
        raise UserError(f"{folder} is not a cache of fast-DiT: no files {FEATURES}/NUMBER.npy")
    files = [folder / FEATURES / f"{number}.npy" for number in found]
    labels = []
    for number in found:
        path = folder / LABELS / f"{number}.npy"
        label = read_npy(path)
        if label.size != 1 or label.dtype.kind not in "iu":
            raise UserError(f"{path} holds {label.dtype} {label.shape} instead of one whole number")
        labels.append(int(label.item()))
    shape = read_npy(files[0]).shape
    if len(shape) != 4 or shape[0] != 1:
        raise UserError(f"{files[0]} has shape {shape}: expected one latent (1, C, h, w)")

    def read(asked: range) -> np.ndarray:
        rows = [checked_rows(files[i], read_npy(files[i]), shape) for i in asked]
        return (np.stack(rows).astype(np.float64) / divide).astype(np.float32)

    names = [f"{name}/{number}.npy" for number in found for name in (FEATURES, LABELS)]
    return PeerLatents(folder, names, shape[1:], "mean", False, np.array(labels, np.int64), read)
