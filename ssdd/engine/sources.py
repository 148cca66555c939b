"""Where images and their labels come from: scikit-learn digits, Fashion-MNIST, a folder of files, or shards."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ssdd.engine.errors import UserError
from ssdd.engine.fetch import cache_folder
from ssdd.engine.file_kinds import check_regular, other_kind
from ssdd.engine.image_files import IMAGE_SUFFIXES, ImageFiles, decode_rgb
from ssdd.engine.noise import seed_of
from ssdd.engine.shards import ShardedImages, open_shards

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FLIP_OF_SOURCE = {"digits": False, "fashion_mnist": False, "imagefolder": True, "webdataset": True}
SMALL_SIDE = 32  # Fashion-MNIST comes in this size, so that at 32 px all the named resizings agree
HELD_OUT_DIGITS = 500
SPLITS = ("train", "val")


@dataclass
class DatasetConfig:
    source: str = field(
        default="imagefolder", metadata={"choices": ("digits", "fashion_mnist", "imagefolder", "webdataset")}
    )
    """Where images come from: digits (scikit-learn, no download), fashion_mnist (IDX files), a folder, or shards."""
    root: str | None = None
    """Folder of the source; for imagefolder it wins over imagenet_root, for fashion_mnist over the usual places.

    For webdataset a folder or URL (s3://, https://, ...) with train/*.tar and val/*.tar, or a pattern of shards as
    URL/{train-{0000..1023},val-{00..63}}.tar. Samples: KEY.jpg|jpeg|png|webp with KEY.cls, or KEY.json with "label".
    """
    cache_dir: str | None = None
    """webdataset: folder for copies of remote shards and for indices; null: ~/.cache/ssdd/shards."""
    imagenet_root: str = "imagenet_data"
    """Image folder in ImageNet layout, ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg; used when root is not set."""
    im_size: int = 128
    """Side of the square images, in pixels."""
    batch_size: int = 256
    """Images a step over all processes together."""
    aug_scale: float | None = None
    """Training: resize the short side to a random length in [im_size, aug_scale * im_size) before the random crop."""
    limit: int | None = None
    """Use only this many images of each split, the same ones every time, as evenly over the classes as they allow."""
    flip: bool | None = None
    """Mirror half of the training images; null: what the source allows (no for digits and Fashion-MNIST, else yes)."""
    crop: str = field(default="resize", metadata={"choices": ("resize", "adm")})
    """Test-time crop: resize (bilinear short side, centre crop; the paper's) or adm (box halving, bicubic; gFID's)."""
    workers: int | None = None
    """Processes that decode images; 0: the training process itself; null: one a core, up to 8, for files and shards,
    else 0. The batches are the same for any number."""
    on_corrupt: str = field(default="error", metadata={"choices": ("error", "skip")})
    """An unreadable image file: stop with its path (error), or leave it out and count it (skip)."""

    @property
    def reading_processes(self) -> int:
        """`workers`, with null replaced."""
        if self.workers is None:
            return min(8, os.cpu_count() or 1) if self.source in ("imagefolder", "webdataset") else 0
        return self.workers


@dataclass
class ImageSource:
    """One split of labelled RGB images.

    name: source name; split: train or val; labels: int64 [n]; class_names: one name a class;
    flip: whether a mirror image is a valid image; pictures: reads image number i.
    """

    name: str
    split: str
    labels: np.ndarray
    class_names: list[str]
    flip: bool
    pictures: PixelArray | ImageFiles | ShardedImages

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Decode image `index` as PIL RGB, at its stored size. UserError with the path when it can't be read."""
        return self.pictures.read(index)

    def where(self, index: int) -> str:
        """Say which picture `index` is: a path for files, else source, split and number."""
        return self.pictures.where(index) or f"{self.name} {self.split} image {index}"

    def fingerprint(self) -> str:
        """Hex sha256 of what the source holds: labels, class names, order and pictures, not where it lies."""
        digest = hashlib.sha256()
        for part in (self.name, self.split, *self.class_names):
            digest.update(part.encode(errors="surrogateescape") + b"\0")
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        self.pictures.add_to(digest)
        return digest.hexdigest()


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


def random_state(*parts: int | str) -> np.random.RandomState:
    """A NumPy stream named by `parts`; RandomState, because NumPy promises never to change what it draws."""
    seed = seed_of(*parts)
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])


def open_source(cfg: DatasetConfig, split: str) -> ImageSource:
    """Open one split ("train" or "val") of the configured source; UserError when it is missing or malformed."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if cfg.limit is not None and cfg.limit < 1:
        raise UserError(f"dataset.limit={cfg.limit}: expected a positive number of images, or null for all")
    if cfg.source == "digits":
        pictures, labels, class_names = _digits(split, cfg.im_size)
    elif cfg.source == "fashion_mnist":
        pictures, labels, class_names = _fashion_mnist(cfg.root, split)
    elif cfg.source == "imagefolder":
        root = Path(cfg.root or cfg.imagenet_root)
        pictures, labels, class_names = _image_folder(root, split, check=cfg.on_corrupt == "error")
    elif cfg.source == "webdataset":
        if not cfg.root:
            raise UserError("dataset.source=webdataset needs dataset.root=FOLDER_OR_URL of the shards")
        pictures, labels, class_names = open_shards(cfg.root, split, cfg.cache_dir)
    else:
        raise UserError(f"dataset.source={cfg.source}: expected one of {', '.join(FLIP_OF_SOURCE)}")
    if cfg.limit is not None and cfg.limit < len(labels):
        chosen = balanced_order(labels)[: cfg.limit]
        pictures, labels = pictures.subset(chosen), labels[chosen]
    flip = FLIP_OF_SOURCE[cfg.source] if cfg.flip is None else cfg.flip
    return ImageSource(cfg.source, split, labels, class_names, flip, pictures)


def balanced_order(labels: np.ndarray) -> np.ndarray:
    """A fixed order of all samples whose every beginning is as balanced over the classes as they allow.

    Each round takes one random sample of every class that still has one. int64 [n], a function of `labels` alone.
    """
    draw = random_state("balanced order")
    order = draw.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class], side="left")
    rounds = np.arange(len(labels)) - starts  # how many samples of its class come before each
    shuffled = draw.permutation(len(labels))
    return by_class[shuffled][np.argsort(rounds[shuffled], kind="stable")].astype(np.int64)


def _digits(split: str, side: int) -> tuple[PixelArray, np.ndarray, list[str]]:
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
    small = np.rint(data.images[indices] * (255 / 16)).astype(np.uint8)
    pixels = [np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)) for digit in small]
    return PixelArray(np.stack(pixels)), labels[indices], [str(digit) for digit in range(10)]


def _fashion_mnist(root: str | None, split: str) -> tuple[PixelArray, np.ndarray, list[str]]:
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
    except Exception as problem:  # no torchvision, no network, a wrong checksum: the remedy is the same
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
        raise UserError(f"{path} is not a whole IDX file: {problem}. Fetch it again") from problem


def _image_folder(root: Path, split: str, check: bool) -> tuple[ImageFiles, np.ndarray, list[str]]:
    """Files of ROOT/SPLIT/CLASS/, classes numbered in the sorted order of their names over both splits.

    check: UserError at once for what has an image's name and is not a file; else it is an unreadable image.
    """
    layout = f"expected {root}/train/CLASS/*.png and {root}/val/CLASS/*.png (also {', '.join(IMAGE_SUFFIXES[1:])})"
    if not (root / split).is_dir():
        missing = root / split if root.is_dir() else root
        raise UserError(f"no image folder at {missing}: {layout}. Set dataset.root=DIR (or dataset.imagenet_root=DIR)")
    class_names = sorted({entry.name for s in SPLITS if (root / s).is_dir() for entry in _folders(root / s)})
    names: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        folder = root / split / class_name
        if not folder.is_dir():
            continue
        entries = [entry for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_SUFFIXES)]
        for entry in entries:
            if check and not entry.is_file(follow_symlinks=False) and other_kind(entry.path):
                decode_rgb(Path(entry.path), entry.path)  # says what it is
        files = sorted(entry.name for entry in entries)
        names.extend(f"{split}/{class_name}/{name}" for name in files)
        labels.extend([label] * len(files))
    if not names:
        raise UserError(f"no images in {root / split}: {layout}")
    return ImageFiles(root, names), np.array(labels, dtype=np.int64), class_names


def _folders(path: Path) -> list[os.DirEntry[str]]:
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_symlink() and "link" in (other_kind(entry.path) or ""):  # of a class, which would go missing
            check_regular(entry.path)
    return [entry for entry in entries if entry.is_dir()]
