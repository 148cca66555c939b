"""fast-DiT: one .npy file per latent and one per label, by number.

    imagenet256_features/{i}.npy  float32 (1, C, h, w): a posterior sample times 0.18215, about unit variance
    imagenet256_labels/{i}.npy    int64 (1,)

That code trains on the values as they are, so an export holds normalised latents. One view per image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from latent_cache.peers.exchange import (
    Block,
    PeerFormat,
    PeerLatents,
    Samples,
    checked_rows,
    npy_bytes,
    put_array,
    read_npy,
)
from ssdd.engine.errors import UserError

FEATURES, LABELS = "imagenet256_features", "imagenet256_labels"


def names(samples: Samples) -> list[str]:
    return [f"{name}/{index}.npy" for index in samples.indices for name in (FEATURES, LABELS)]


def size(shape: tuple[int, int, int], count: int) -> int:
    """Bytes of `count` latents (C, h, w)."""
    return count * (npy_bytes(*shape) + npy_bytes(1, itemsize=8))


def write(paths: list[Path], block: Block, seed: int) -> None:
    latents = block.drawn(0, seed).numpy()
    for row, (feature, label) in enumerate(zip(paths[::2], paths[1::2], strict=True)):
        put_array(label, block.samples.labels[row : row + 1].astype(np.int64))
        put_array(feature, latents[row : row + 1])


def open_folder(folder: Path) -> PeerLatents:
    """Numbers may have gaps, since one process of several may drop some."""
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
        return np.stack([checked_rows(files[i], read_npy(files[i]), shape) for i in asked])

    names = [f"{name}/{number}.npy" for number in found for name in (FEATURES, LABELS)]
    return PeerLatents(folder, names, shape[1:], "mean", False, np.array(labels, np.int64), read)


FORMAT = PeerFormat(
    project="fast-DiT",
    holds="normalised samples",
    block=256,
    names=names,
    size=size,
    write=write,
    open=open_folder,
    normalised=True,
    scaling_factor=0.18215,
)
