"""What a layout of another repository is, and what is exchanged with it: blocks of latents out, an opened folder in."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.random import indexed_noise
from ssdd.model.latent import DiagonalGaussian, LatentNorm

LOGVAR_FLOOR = -30.0  # of a posterior without deviation, as DiagonalGaussian clamps


class Samples(NamedTuple):
    """Block `number` of an export: samples `indices` with labels int64 [n], and the names of all classes."""

    number: int
    indices: range
    labels: np.ndarray
    class_names: list[str]


@dataclass
class Block:
    """The latents of `samples`, in the values that the format stores.

    means: float32 [n, view, C, h, w]; logvars the same, or None where the cache has means only.
    """

    samples: Samples
    means: Tensor
    logvars: Tensor | None

    def drawn(self, view: int, seed: int) -> Tensor:
        """One draw from every posterior, that of (seed, view, index): float32 [n, C, h, w]; else the means."""
        if self.logvars is None:
            return self.means[:, view]
        noise = indexed_noise(np.array(self.samples.indices), self.means.shape[2:], seed, f"export view {view}")
        return DiagonalGaussian(self.moments(view)).sample(noise=noise)

    def moments(self, view: int) -> Tensor:
        """Means and log variances, float32 [n, 2C, h, w]."""
        logvars = torch.full_like(self.means, LOGVAR_FLOOR) if self.logvars is None else self.logvars
        return torch.cat([self.means[:, view], logvars[:, view]], 1)

    def deviations(self, view: int) -> Tensor:
        """Posterior deviations, float32 [n, C, h, w]; 0 where the cache has means only."""
        if self.logvars is None:
            return torch.zeros_like(self.means[:, view])
        return DiagonalGaussian(self.moments(view)).std


@dataclass
class PeerLatents:
    """An opened source: `count` latents with labels int64 [count], in files `names` below `folder`.

    read(range) gives rows as in a build, before normalisation, float32 [n, view, K, h, w], where shape is
    (K, h, w) and K is C, or with content=moments 2C.
    """

    folder: Path
    names: list[str]
    shape: tuple[int, int, int]
    content: str
    flip: bool
    labels: np.ndarray
    read: Callable[[range], np.ndarray]

    @property
    def count(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class PeerFormat:
    """How another repository stores latents. Samples are written in blocks of `block`, each to files of its own.

    project: the repository. holds: what is stored of a latent, for the help text.
    names(samples): files of a block, below the folder. size((C, h, w), n): bytes of n latents, nearly.
    write(paths, block, seed): the files of a block, whose paths those of `names` are.
    finish(folder, labels int64 [count], class_names, norm): what accompanies the latents of a whole split; `norm` is
    that of its cache.
    open(folder): the reader of `import`; None where there is none.
    normalised: the values are what a generator sees, and not raw. both_views: mirrored latents are stored too.
    posteriors: means with deviations or log variances are stored, and not samples. scaling_factor: stored values of a
    foreign folder are raw latents times this, unless the user says otherwise.
    """

    project: str
    holds: str
    block: int
    names: Callable[[Samples], list[str]]
    size: Callable[[tuple[int, int, int], int], int]
    write: Callable[[list[Path], Block, int], None]
    finish: Callable[[Path, np.ndarray, list[str], LatentNorm], None] | None = None
    open: Callable[[Path], PeerLatents] | None = None
    normalised: bool = False
    both_views: bool = False
    posteriors: bool = False
    scaling_factor: float = 1.0

    @property
    def keys(self) -> list[str]:
        """The keys of `export` that only some formats use, and this one does."""
        return (["flips"] if self.both_views else []) + (["scaling_factor"] if self.posteriors else ["seed"])


def read_npy(path: Path) -> np.ndarray:
    """A .npy file as an array of numbers. UserError for one that is missing, damaged or holds objects."""
    check_regular(path)
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        raise UserError(f"{path} can't be read as an array of numbers: {problem}; nothing in it was executed") from None


def checked_rows(path: Path, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`rows` as float32 if they have this shape and are finite. UserError otherwise."""
    if rows.shape != shape:
        raise UserError(f"{path} has shape {rows.shape}, others have {shape}: all latents of a cache have one shape")
    rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        raise UserError(f"{path} holds values that are not finite: write it again from its encoder")
    return rows


def put_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file that is whole or absent; not synced, which an export does once for all its files."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    os.replace(temporary, path)


def npy_bytes(*shape: int, itemsize: int = 4) -> int:
    """Size of a .npy file of this shape: a header of 128 bytes, then the values."""
    return 128 + int(np.prod(shape)) * itemsize
