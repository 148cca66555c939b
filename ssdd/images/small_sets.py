"""Data sets small enough for memory: scikit-learn's digits, and Fashion-MNIST from its IDX files."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np
from PIL import Image

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.random import random_state
from ssdd.engine.user_cache import cache_folder
from ssdd.images.pixels import PEAK

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SMALL_SIDE = 32  # Fashion-MNIST comes in this size, so that at 32 px all the named resizings agree
HELD_OUT_DIGITS = 500


class PixelArray:
    """Pictures that lie in memory: uint8 grey [n, h, w]."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def where(self, index: int) -> str:
        return ""

    def subset(self, indices: np.ndarray) -> PixelArray:
        return PixelArray(self.pixels[indices])

    def add_to(self, digest: hashlib._Hash) -> None:
        digest.update(repr(self.pixels.shape).encode() + np.ascontiguousarray(self.pixels).tobytes())


def read_digits(split: str, side: int) -> tuple[PixelArray, np.ndarray, list[str]]:
    """The 1797 digits of scikit-learn (8 x 8, grey 0..16), 500 of them held out, every class in proportion.

    They come enlarged, bicubic, to side x side. Left at 8 x 8, the resizings for training (Lanczos), evaluation
    (bilinear) and gFID (ADM: bicubic) would make three different data sets of them, only 24 to 31 dB alike.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    counts = np.bincount(labels)
    share = HELD_OUT_DIGITS * counts / counts.sum()
    held_out = np.floor(share).astype(int)
    held_out[np.argsort(held_out - share, kind="stable")[: HELD_OUT_DIGITS - held_out.sum()]] += 1
    order = random_state("digits split").permutation(len(labels))
    members = [order[labels[order] == digit] for digit in range(10)]
    val = np.concatenate([own[:n] for own, n in zip(members, held_out, strict=True)])
    indices = np.sort(val) if split == "val" else np.setdiff1d(np.arange(len(labels)), val)
    small = np.rint(data.images[indices] * (PEAK / 16)).astype(np.uint8)
    pixels = [np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)) for digit in small]
    return PixelArray(np.stack(pixels)), labels[indices], [str(digit) for digit in range(10)]


def read_fashion_mnist(root: str | None, split: str) -> tuple[PixelArray, np.ndarray, list[str]]:
    """The 28 x 28 pictures of the IDX files, with a black border that makes them 32 x 32."""
    stem = "train" if split == "train" else "t10k"
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    folders = [Path(root), Path(root) / "FashionMNIST" / "raw"] if root else [FASHION_MNIST_FOLDER, _downloaded()]
    images_file, labels_file = _idx_pair(folders, names) or _download_pair(root, folders, names)
    pixels, labels = _read_idx(images_file, 3), _read_idx(labels_file, 1).astype(np.int64)
    if len(pixels) != len(labels) or len(labels) == 0 or labels.max() >= len(FASHION_MNIST_CLASSES):
        raise UserError(
            f"{images_file} and {labels_file} do not belong together: {len(pixels)} images, {len(labels)} labels, "
            f"which should be equally many, with labels 0..9"
        )
    border = [((SMALL_SIDE - side) // 2, (SMALL_SIDE - side + 1) // 2) for side in pixels.shape[1:]]
    if min(border[0] + border[1]) < 0:
        raise UserError(f"{images_file} holds pictures of {pixels.shape[1:]} px, expected (28, 28)")
    return PixelArray(np.pad(pixels, [(0, 0), *border])), labels, list(FASHION_MNIST_CLASSES)


def _downloaded() -> Path:
    return cache_folder() / "FashionMNIST" / "raw"


def _idx_pair(folders: Sequence[Path], names: tuple[str, str]) -> tuple[Path, Path] | None:
    for folder in folders:
        for suffix in (".gz", ""):
            pair = folder / (names[0] + suffix), folder / (names[1] + suffix)
            if all(path.is_file() for path in pair):
                return pair
    return None


def _download_pair(root: str | None, folders: Sequence[Path], names: tuple[str, str]) -> tuple[Path, Path]:
    remedy = (
        "On Debian and Ubuntu `apt-get install dataset-fashion-mnist` lays the files down; elsewhere put "
        "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz into a folder and set dataset.root=FOLDER"
    )
    searched = ", ".join(str(folder) for folder in folders)
    if root:
        raise UserError(f"no Fashion-MNIST files ({names[0]}.gz, {names[1]}.gz) in {searched}. {remedy}")
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(_downloaded().parents[1]), download=True)
    except (ImportError, OSError, RuntimeError, HTTPException) as problem:  # no torchvision, no network, a bad file
        raise UserError(
            f"Fashion-MNIST is not on this machine (looked in {searched}) and the download failed "
            f"({type(problem).__name__}: {problem}). {remedy}"
        ) from problem
    pair = _idx_pair(folders, names)
    if pair is None:
        raise UserError(f"the Fashion-MNIST download left no {names[0]} in {folders[-1]}. {remedy}")
    return pair


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist), gzipped or not."""
    try:
        check_regular(path)
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", data)
        if magic != 0x800 + dimensions:
            raise ValueError(f"the file starts with {magic:#x} instead of {0x800 + dimensions:#x}")
        return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as problem:
        raise UserError(f"{path} is not a complete IDX file: {problem}. Fetch it again") from problem
