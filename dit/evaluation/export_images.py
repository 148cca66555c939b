"""Decoded images for external evaluators: ADM's npz, written as a stream, and folders of PNG files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ssdd.engine.files import remove_leftovers, replacing
from ssdd.fidelity.stored_sets import NPZ_IMAGES, NPZ_LABELS

EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can hold: equal images give equal bytes


def write_npz(path: Path, batches: Iterable[Tensor], count: int, labels: Tensor) -> None:
    """ADM's form: `arr_0` uint8 [count, H, W, 3] and `arr_1` int64 [count], stored as numpy.savez does; atomic.

    batches: uint8 [n, 3, H, W], `count` images together, of which one batch at a time is in memory. ValueError when
    they are more or fewer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    written = 0
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo(f"{NPZ_IMAGES}.npy", EPOCH), "w", force_zip64=True) as member:
            for batch in batches:
                pixels = np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy())
                if written == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *pixels.shape[1:])}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(pixels)
                written += len(pixels)
        with archive.open(zipfile.ZipInfo(f"{NPZ_LABELS}.npy", EPOCH), "w") as member:
            np.lib.format.write_array(member, labels.numpy(), allow_pickle=False)
        if written != count:
            raise ValueError(f"expected {count} images, got {written}")


def write_pngs(folder: Path, images: Tensor, indices: Iterable[int]) -> None:
    """uint8 [n, 3, H, W] as folder/000123.png, named by sample index.

    Files are not synced one by one: who writes them notes elsewhere that all are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in zip(indices, images.permute(0, 2, 3, 1).numpy(), strict=True):
        Image.fromarray(np.ascontiguousarray(picture)).save(folder / f"{index:06d}.png")
