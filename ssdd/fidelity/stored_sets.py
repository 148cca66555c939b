"""Sets of images to measure: splits of data sets, image files of any sizes, WebDataset shards, ADM's npz of samples.

Images come as 8-bit RGB pixels. A set records how they were treated: counts of files by format and size, and the
named crop. Sets that were treated differently are not comparable (a resize or JPEG moves an FID), and
`check_comparable` refuses them.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import sha256_json
from ssdd.images.batches import eval_batches
from ssdd.images.crops import CROPS
from ssdd.images.dataset import ImageDataset
from ssdd.images.shards import ShardedImages, index_tar, pictures_of
from ssdd.images.sources import DatasetConfig, open_source
from ssdd.images.stored_files import IMAGE_SUFFIXES, ImageFiles

NPZ_IMAGES, NPZ_LABELS = "arr_0", "arr_1"


@dataclass(frozen=True)
class Treatment:
    """How images came to their size.

    crop: adm, resize, none (taken as they are), or unknown (not recorded by a foreign file);
    size: (height, width) of all images, None when they differ or when it is unknown.
    """

    crop: str
    size: tuple[int, int] | None

    def __str__(self) -> str:
        size = f"{self.size[1]}x{self.size[0]}" if self.size else "sizes that differ or are unknown"
        return f"{size}, crop {self.crop}"


def check_comparable(a: Treatment, b: Treatment, names: tuple[str, str], allow_mismatch: bool) -> str | None:
    """What makes two sets incomparable, or None; UserError unless `allow_mismatch`.

    Images taken as they are fit any crop to their own size. An unknown treatment is trusted as far as sizes agree.
    """
    problem = None
    if "unknown" not in (a.crop, b.crop) and (a.size is None or b.size is None):
        problem = "images of one set have different sizes"
    elif a.size is not None and b.size is not None and a.size != b.size:
        problem = "the images differ in size"
    elif a.crop != b.crop and not {a.crop, b.crop} & {"none", "unknown"}:
        problem = "the crops differ"
    if problem is None:
        return None
    problem = f"{problem} ({names[0]}: {a}; {names[1]}: {b})"
    if not allow_mismatch:
        raise UserError(
            f"{problem}: such distances are not comparable with published ones. Set im_size=N for the same crop of "
            "both (crop=adm is that of every gFID reference), or allow_mismatch=true to compare them as they are"
        )
    return problem


class SplitImages:
    """A split ("train" or "val") with the crop and size of its config; read by `dataset.workers` processes."""

    def __init__(self, cfg: DatasetConfig, split: str):
        self.dataset = ImageDataset(open_source(cfg, split), cfg, train=False)
        self.treatment = Treatment(cfg.crop, (cfg.im_size, cfg.im_size))

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str:
        """Hex sha256 of what the split holds; another one where unreadable images are skipped instead of an error."""
        source, skips = self.dataset.source.fingerprint(), self.dataset.cfg.on_corrupt == "skip"
        return sha256_json([source, "unreadable skipped"]) if skips else source

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 [n, 3, H, W], indices int64 [n]) of the readable images rank, rank + world, ..."""
        for pixels, _, indices in eval_batches(
            self.dataset, batch_size, rank, world, self.dataset.cfg.reading_processes
        ):
            yield pixels, indices

    def describe(self) -> dict[str, Any]:
        """What a result records of the set, in JSON values."""
        source, cfg = self.dataset.source, self.dataset.cfg
        return {
            "source": source.name,
            "split": source.split,
            "crop": cfg.crop,
            "size": [cfg.im_size, cfg.im_size],
            "count": len(self),
            "fingerprint": source.fingerprint(),
            "on_corrupt": cfg.on_corrupt,
        }


class StoredSet:
    """A set of images at one path: its length, its treatment, a description, and its pixels in batches."""

    def __init__(self, path: Path, images: _Pictures | _Npz, im_size: int | None, crop: str) -> None:
        self.path = path
        self.treatment = _treatment(images.shapes, im_size, crop)
        self._images, self._im_size, self._crop = images, im_size, crop

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 [n, 3, h, w], indices int64 [n]) of the images rank, rank + world, ...; all of a batch of one size."""
        pixels: list[np.ndarray] = []
        indices: list[int] = []
        for index, picture in self._images.read(range(rank, len(self), world)):
            image = _cropped(picture, self._im_size, self._crop)
            if pixels and (len(pixels) == batch_size or image.shape != pixels[0].shape):
                yield _stacked(pixels), torch.tensor(indices)
                pixels, indices = [], []
            pixels.append(image)
            indices.append(index)
        if pixels:
            yield _stacked(pixels), torch.tensor(indices)

    def describe(self) -> dict[str, Any]:
        """What a result records of the set, in JSON values."""
        size = list(self.treatment.size) if self.treatment.size else None
        return {
            "path": str(self.path),
            "count": len(self),
            "stored": self._images.stored,
            "crop": self.treatment.crop,
            "size": size,
            "labels": self._images.labels(),
            "rounding": "8-bit pixels as stored",
        }

    def fingerprint(self) -> str:
        """Hex sha256 of what the set holds, not of where it lies."""
        return self._images.fingerprint()


def open_set(path: str | Path, im_size: int | None = None, crop: str = "adm") -> StoredSet:
    """Open an image folder (searched recursively, in the order of paths), WebDataset shards (a .tar, or a folder that
    has them and no image files), or an npz with uint8 NHWC `arr_0`.

    im_size: side of the square that `crop` (adm or resize) cuts; None takes images as they are.
    UserError when there is no image, or the file is of another kind.
    """
    path = Path(path)
    if im_size is not None and im_size < 1:
        raise UserError(f"im_size={im_size}: expected a positive number of pixels, or null")
    if not path.is_dir():
        check_regular(path)
    if path.is_dir():
        return StoredSet(path, _Pictures(_pictures_below(path)), im_size, crop)
    if path.suffix.lower() == ".tar" and path.is_file():
        return StoredSet(path, _Pictures(_in_shards([path])), im_size, crop)
    if path.suffix == ".npz" and path.is_file():
        return StoredSet(path, _Npz(path), im_size, crop)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    raise UserError(f"{path}: expected a folder of images, .tar shards of them, or an .npz file with {NPZ_IMAGES}")


def _pictures_below(path: Path) -> ImageFiles | ShardedImages:
    """The image files of a folder, or the pictures of its shards where it has no image file."""
    names = sorted(
        os.path.relpath(os.path.join(folder, name), path)
        for folder, files in _folders_below(path)
        for name in files
        if name.lower().endswith((*IMAGE_SUFFIXES, ".tar")) and not name.startswith(".")
    )
    if files := [name for name in names if not name.lower().endswith(".tar")]:
        return ImageFiles(path, files)
    if not names:
        raise UserError(
            f"no images in {path}: expected files {', '.join(IMAGE_SUFFIXES)} or .tar, also in folders below it"
        )
    return _in_shards([path / name for name in names])


def _folders_below(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, files in it), links to folders followed. UserError for one that leads in a circle."""
    for folder, folders, files in os.walk(path, followlinks=True):
        for link in (Path(folder, name) for name in folders):
            if link.is_symlink() and Path(folder).resolve().is_relative_to(link.resolve()):
                raise UserError(f"{link} leads back to {link.resolve()}, which contains it: remove the link")
        yield folder, files


def _in_shards(tars: list[Path]) -> ShardedImages:
    return pictures_of([(tar, index_tar(tar, labelled=False)) for tar in tars])[0]


class _Pictures:
    """Encoded pictures, one at a time. shapes: all (height, width); stored: how many there are of each kind."""

    def __init__(self, pictures: ImageFiles | ShardedImages) -> None:
        self._pictures = pictures
        self.shapes: set[tuple[int, int]] = set()
        stored: Counter[str] = Counter()
        for index in range(len(self)):
            kind, width, height = pictures.stored(index)
            stored[f"{kind} {width}x{height}"] += 1
            self.shapes.add((height, width))
        self.stored = dict(stored.most_common())

    def __len__(self) -> int:
        return len(self._pictures.names)

    def labels(self) -> str:
        return "not stored"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        self._pictures.add_to(digest)
        return digest.hexdigest()

    def read(self, indices: range) -> Iterator[tuple[int, Image.Image]]:
        """(index, RGB picture) in ascending order."""
        return ((index, self._pictures.read(index)) for index in indices)


class _Npz:
    """Read as a stream, one image after the other: 50 000 images of 256 px are 9.8 GB. Else as `_Pictures`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _npz(path) as archive:
            self._members = sorted((entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist())
            if f"{NPZ_IMAGES}.npy" not in archive.namelist():
                raise UserError(f"{path} holds no images: there is no array {NPZ_IMAGES}")
            with archive.open(f"{NPZ_IMAGES}.npy") as stream:
                self._shape = _image_header(path, stream)
        count, height, width, _ = self._shape
        self.shapes, self.stored = {(height, width)}, {f"npz RGB {width}x{height}": count}

    def __len__(self) -> int:
        return self._shape[0]

    def labels(self) -> str:
        with _npz(self._path) as archive:
            if f"{NPZ_LABELS}.npy" not in archive.namelist():
                return "not stored"
        labels = np.load(self._path, allow_pickle=False)[NPZ_LABELS]
        counts = np.unique(labels, return_counts=True)[1]
        return f"{len(counts)} classes, {'balanced' if len(set(counts.tolist())) == 1 else 'random or unbalanced'}"

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self._members).encode()).hexdigest()

    def read(self, indices: range) -> Iterator[tuple[int, Image.Image]]:
        size = int(np.prod(self._shape[1:]))
        with _npz(self._path) as archive, archive.open(f"{NPZ_IMAGES}.npy") as stream:
            _image_header(self._path, stream)
            for index in range(len(self)):
                data = stream.read(size)
                if len(data) < size:
                    raise UserError(f"{self._path} ends after {index} of {len(self)} images: copy it again")
                if index in indices:
                    yield index, Image.fromarray(np.frombuffer(data, np.uint8).reshape(self._shape[1:]))


def _npz(path: Path) -> zipfile.ZipFile:
    check_regular(path)
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as problem:
        raise UserError(f"{path} is not a complete npz file: {problem}") from problem


def _image_header(path: Path, stream: Any) -> tuple[int, ...]:
    """Shape of the images whose array starts here; leaves the stream at the first pixel."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except ValueError as problem:
        raise UserError(f"{path}: the array {NPZ_IMAGES} is damaged: {problem}") from problem
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or not shape[0]:
        raise UserError(f"{path}: {NPZ_IMAGES} is {dtype} {shape}, expected uint8 images (n, height, width, 3)")
    return shape


def _treatment(shapes: set[tuple[int, int]], im_size: int | None, crop: str) -> Treatment:
    if im_size is None or shapes == {(im_size, im_size)}:  # a crop to their own size leaves images as they are
        return Treatment("none", next(iter(shapes)) if len(shapes) == 1 else None)
    return Treatment(crop, (im_size, im_size))


def _cropped(image: Image.Image, im_size: int | None, crop: str) -> np.ndarray:
    return np.asarray(image if im_size is None else CROPS[crop](image, im_size))


def _stacked(pixels: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
