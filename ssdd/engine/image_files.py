"""Pictures that lie in files: decoded one at a time, fingerprinted by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ssdd.engine.errors import UserError

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
        sizes = [(self.folder / name).stat().st_size for name in self.names]
        add_files(digest, self.names, sizes, lambda index: (self.folder / self.names[index]).read_bytes())


def decode_rgb(file: Path | BinaryIO, where: str) -> Image.Image:
    """Decode an encoded picture as PIL RGB. UserError that says `where` it lies when it can't be read."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as problem:  # a damaged file makes the decoders raise almost anything
        raise UserError(
            f"can't read the image {where}: {type(problem).__name__}: {problem}. "
            "Replace or remove the file, or set dataset.on_corrupt=skip to leave such images out"
        ) from problem


def stored_as(file: Path | BinaryIO, where: str) -> tuple[str, int, int]:
    """(format and mode, width, height) that the picture's header tells; errors as of `decode_rgb`."""
    try:
        with Image.open(file) as image:
            return f"{image.format} {image.mode}", *image.size
    except Exception as problem:  # a damaged file makes the decoders raise almost anything
        raise UserError(f"can't read the image {where}: {type(problem).__name__}: {problem}. Remove it") from problem


def add_files(digest: hashlib._Hash, names: Sequence[str], sizes: Sequence[int], content: Callable[[int], bytes]):
    """Update `digest` with names and sizes, and with the content of each file unless all together are large."""
    by_content = sum(sizes) <= HASHED_BYTES
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        digest.update(f"{name}\0{size}\0".encode())
        if by_content:
            digest.update(hashlib.sha256(content(index)).digest())
