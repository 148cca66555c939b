"""REPA and edm2: one .npy file per image with the mean and deviation of its posterior, and the labels in one file.

    XXXXX/img-mean-std-XXXXXXXX.npy  float32 (2C, h, w), raw: means, then deviations; the folder is number // 1000
    dataset.json                     {"labels": [[file, class], ...]}

The trainer draws samples and scales them. One view per image.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import numpy as np

from latent_cache.peers.exchange import (
    LOGVAR_FLOOR,
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
from ssdd.engine.files import read_json, write_atomic
from ssdd.model.latent import LatentNorm

LABELS = "dataset.json"


def name_of(index: int) -> str:
    """12345 -> "00012/img-mean-std-00012345.npy"."""
    return f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"


def names(samples: Samples) -> list[str]:
    return [name_of(index) for index in samples.indices]


def size(shape: tuple[int, int, int], count: int) -> int:
    """Bytes of `count` latents (C, h, w), but for the file of labels."""
    return count * npy_bytes(2 * shape[0], *shape[1:])


def write(paths: list[Path], block: Block, seed: int) -> None:
    rows = np.concatenate([block.means[:, 0].numpy(), block.deviations(0).numpy()], 1)
    for path, row in zip(paths, rows, strict=True):
        put_array(path, row)


def finish(folder: Path, labels: np.ndarray, class_names: list[str], norm: LatentNorm) -> None:
    entries = [[name_of(index), label] for index, label in enumerate(labels.tolist())]
    write_atomic(folder / LABELS, json.dumps({"labels": entries}))


def open_folder(folder: Path) -> PeerLatents:
    """content=mean if the first deviations are all 0, as written for a deterministic encoder."""
    if not (folder / LABELS).is_file():
        raise UserError(f"{folder} is not a cache of REPA: {LABELS} is missing (a zip has to be unpacked first)")
    stored = read_json(folder / LABELS)
    entries = stored.get("labels") if isinstance(stored, dict) else None
    if not entries or not all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) is int
        for entry in entries
    ):
        raise UserError(f'{folder / LABELS} is not of the form {{"labels": [[file, class], ...]}}')
    listed = [PurePosixPath(file) for file, _ in entries]
    if outside := [path for path in listed if path.is_absolute() or ".." in path.parts]:
        raise UserError(f"{folder / LABELS} names {outside[0]}, which is not below {folder}")
    files = [folder / path for path in listed]
    first = read_npy(files[0])
    if first.ndim != 3 or len(first) % 2:
        raise UserError(f"{files[0]} has shape {first.shape}: expected means and deviations (2C, h, w)")
    channels, shape = len(first) // 2, first.shape
    moments = bool((first[channels:] != 0).any())

    def read(asked: range) -> np.ndarray:
        return np.stack([_row(files[i]) for i in asked])[:, None]

    def _row(path: Path) -> np.ndarray:
        row = checked_rows(path, read_npy(path), shape)
        mean, std = row[:channels], row[channels:].astype(np.float64)
        if (std < 0).any():
            raise UserError(f"{path} holds negative deviations: expected means, then deviations (2C, h, w)")
        if not moments:
            if std.any():
                raise UserError(f"{path} has posterior deviations, {files[0]} has none: the cache is inconsistent")
            return mean
        with np.errstate(divide="ignore"):
            return np.concatenate([mean, np.maximum(2 * np.log(std), LOGVAR_FLOOR)]).astype(np.float32)

    rows_shape = shape if moments else (channels, *shape[1:])
    labels = np.array([label for _, label in entries], np.int64)
    content = "moments" if moments else "mean"
    return PeerLatents(folder, [file for file, _ in entries] + [LABELS], rows_shape, content, False, labels, read)


FORMAT = PeerFormat(
    project="REPA",
    holds="raw means and deviations",
    block=256,
    names=names,
    size=size,
    write=write,
    finish=finish,
    open=open_folder,
    posteriors=True,
)
