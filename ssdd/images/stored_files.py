"""Pictures that lie in files: decoded one at a time, fingerprinted by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import other_kind

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HASHED_BYTES = 1 << 30  # a set up to this size is fingerprinted by content, a larger one by names and sizes


class ImageFiles:
    """Pictures that are files under one folder, named relative to it."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.names = names

    def read(self, index: int) -> Image.Image:
        return decode_rgb(self.folder / self.names[index], self.where(index))

    def where(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def stored(self, index: int) -> tuple[str, int, int]:
        return stored_as(self.folder / self.names[index], self.where(index))

    def subset(self, indices: np.ndarray) -> ImageFiles:
        return ImageFiles(self.folder, [self.names[i] for i in indices])

    def add_to(self, digest: hashlib._Hash) -> None:
        paths = [self.folder / name for name in self.names]
        kinds = [other_kind(path) for path in paths]  # what is not a file has no content
        sizes = [kind or path.stat().st_size for path, kind in zip(paths, kinds, strict=True)]
        add_files(digest, self.names, sizes, lambda index: b"" if kinds[index] else paths[index].read_bytes())


def decode_rgb(file: Path | BinaryIO, where: str) -> Image.Image:
    """Decode an encoded picture as PIL RGB. UserError that names `where` it lies when it can't be read."""
    remedy = "Replace or remove the file, or set dataset.on_corrupt=skip to skip such images"
    with _opened(file, where, remedy) as image:
        return image.convert("RGB")


def stored_as(file: Path | BinaryIO, where: str) -> tuple[str, int, int]:
    """(format and mode, width, height) from the picture's header; errors as of `decode_rgb`."""
    with _opened(file, where, "Remove it") as image:
        return f"{image.format} {image.mode}", *image.size


@contextmanager
def _opened(file: Path | BinaryIO, where: str, remedy: str) -> Iterator[Image.Image]:
    """The picture; whatever fails while it is read becomes a UserError with the remedy."""
    if isinstance(file, Path) and (kind := other_kind(file)) is not None:
        raise UserError(f"can't read the image {where}: it is {kind}, not a regular file. {remedy}")
    try:
        with Image.open(file) as image:
            yield image
    except Exception as problem:  # a damaged file makes the decoders raise almost anything
        raise UserError(f"can't read the image {where}: {type(problem).__name__}: {problem}. {remedy}") from problem


def add_files(
    digest: hashlib._Hash, names: Sequence[str], sizes: Sequence[int | str], content: Callable[[int], bytes]
) -> None:
    """Update `digest` with names and sizes, and with the content of each file unless all together are large.

    sizes: in bytes, or the kind of what is there instead of a file.
    """
    by_content = sum(size for size in sizes if isinstance(size, int)) <= HASHED_BYTES
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        if by_content:
            digest.update(hashlib.sha256(content(index)).digest())
