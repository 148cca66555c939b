"""Images in WebDataset shards: tars of `{key}.jpg` and `{key}.cls`, local or at any fsspec URL, read by index.

Stock loaders read shards as streams, in an order that depends on processes and workers. Here any picture can be read at
any time, as from a folder of files: each tar is scanned once, and where its members lie is kept in a small JSON
file. Remote shards are first copied, whole, to this machine.
"""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ssdd.engine.errors import UserError, full_disk
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import read_json, write_atomic
from ssdd.engine.locks import locked
from ssdd.engine.remote import BLOCK, MissingFile, RemoteFolder
from ssdd.engine.user_cache import cache_folder
from ssdd.images.stored_files import add_files, decode_rgb, stored_as

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
PICKLE_EXTENSIONS = ("pyd", "pkl", "pickle", "pt", "pth")
SPLIT_WORD = {"train": r"(?<![a-z])train(?![a-z])", "val": r"(?<![a-z])val(idation)?(?![a-z])"}
INDEX_VERSION = 1
THREADS = 8  # shards that are downloaded at once

Entry = tuple[str, int, int, int]  # (key and extension, offset, bytes, label) of one picture

log = logging.getLogger(__name__)


class ShardedImages:
    """Pictures inside local tars: picture i is `places[i]` = (number of the tar, offset, bytes), named `names[i]`."""

    def __init__(self, tars: list[Path], places: np.ndarray, names: list[str]) -> None:
        self.tars = tars
        self.places = places  # int64 [n, 3]
        self.names = names

    def read(self, index: int) -> Image.Image:
        return decode_rgb(io.BytesIO(self._bytes(index)), self.where(index))

    def where(self, index: int) -> str:
        return f"{self.tars[self.places[index, 0]]}:{self.names[index]}"

    def stored(self, index: int) -> tuple[str, int, int]:
        return stored_as(io.BytesIO(self._bytes(index)), self.where(index))

    def subset(self, indices: np.ndarray) -> ShardedImages:
        return ShardedImages(self.tars, self.places[indices], [self.names[i] for i in indices])

    def add_to(self, digest: Any) -> None:
        """Names and contents; how they are spread over shards makes no difference."""
        add_files(digest, self.names, self.places[:, 2].tolist(), self._bytes)

    def _bytes(self, index: int) -> bytes:
        tar, offset, size = self.places[index].tolist()
        try:
            with open(self.tars[tar], "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise UserError(f"can't read {self.where(index)}: {error}") from None


def open_shards(root: str, split: str, cache_dir: str | None = None) -> tuple[ShardedImages, np.ndarray, list[str]]:
    """Pictures of one split, their labels int64 [n], and the class names: order of the shards' names, then of members.

    root: a folder or URL with `train/*.tar` and `val/*.tar`, or a brace pattern of shards whose names say their split,
    such as `URL/{train-{0000..1023},val-{00..63}}.tar`. A sample is `{key}.jpg|jpeg|png|webp` with `{key}.cls`, or
    `{key}.json` with "label". `classes.txt` beside it has one name per line; without it the classes are those of the
    split, called by their numbers.
    cache_dir: folder of copies of remote shards, and of indices. UserError for all that is missing or malformed.
    """
    folder, names = _find(root, split)
    cache = Path(cache_dir) if cache_dir else cache_folder() / "shards"
    place = cache / sha256(str(folder.local() or folder.url).encode(errors="surrogateescape")).hexdigest()[:16]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(place), ThreadPoolExecutor(THREADS) as pool:  # of many processes, the first does the work
            shards = list(pool.map(lambda name: _open_shard(folder, name, place), names))
    except OSError as error:
        problem = "no space left" if full_disk(error) else str(error)
        raise UserError(f"can't index or copy shards into {place}: {problem}. Set dataset.cache_dir=FOLDER") from None
    pictures, labels = pictures_of(shards)
    class_names = _class_names(folder) or [str(label) for label in range(labels.max() + 1)]
    if labels.max() >= len(class_names):
        worst = pictures.where(int(labels.argmax()))
        raise UserError(f"{worst} has label {labels.max()}, but {folder.where('classes.txt')} names {len(class_names)}")
    return pictures, labels, class_names


def pictures_of(shards: Sequence[tuple[Path, list[Entry]]]) -> tuple[ShardedImages, np.ndarray]:
    """Pictures of local tars, scanned by `index_tar`, in order; and their labels, int64 [n]."""
    entries = [(number, *entry) for number, (_, found) in enumerate(shards) for entry in found]
    places = np.array([(number, offset, size) for number, _, offset, size, _ in entries], dtype=np.int64)
    labels = np.array([label for *_, label in entries], dtype=np.int64)
    return ShardedImages([path for path, _ in shards], places, [name for _, name, *_ in entries]), labels


def _find(root: str, split: str) -> tuple[RemoteFolder, list[str]]:
    """The folder that `root` means, and the shards of the split in it."""
    if re.match(r"\s*pipe:", root):
        raise UserError(f"dataset.root={root}: commands are not run; give a folder, or a URL such as s3:// or https://")
    if "{" not in root and not root.endswith(".tar"):
        folder = RemoteFolder(root)
        names = [f"{split}/{name}" for name in folder.names(split) if name.endswith(".tar")]
        if not names:
            raise UserError(
                f"no shards at {folder.where(split)}/*.tar: expected {root}/train/*.tar and {root}/val/*.tar. Set "
                "dataset.root=DIR_OR_URL, or, where a server lists no folders, a pattern as URL/{train/{000..127},"
                "val/{00..06}}.tar"
            )
        return folder, names
    import braceexpand

    base = root.partition("{")[0].rpartition("/")[0] or "."
    try:
        paths = list(braceexpand.braceexpand(root))
    except ValueError as error:
        raise UserError(f"dataset.root={root}: {error}") from None
    names = [path.removeprefix(f"{base}/") for path in paths]
    of_split = [name for name in names if re.search(SPLIT_WORD[split], name.lower())]
    if not of_split:
        raise UserError(
            f"dataset.root={root}: no shard of split {split} among {names[0]} ... {names[-1]}. Names must "
            "contain their split, as in DIR_OR_URL/{train-{000..127},val-{00..06}}.tar"
        )
    return RemoteFolder(base), of_split


def _class_names(folder: RemoteFolder) -> list[str]:
    try:
        return folder.read("classes.txt").decode().splitlines()
    except MissingFile:
        return []
    except UnicodeDecodeError as error:
        raise UserError(f"{folder.where('classes.txt')}: expected a UTF-8 class name per line ({error})") from None


def _open_shard(folder: RemoteFolder, name: str, place: Path) -> tuple[Path, list[Entry]]:
    """The shard as it is now: copied if it is remote, and scanned, unless `place` has that already."""
    local = folder.local(name)
    path, index = local or place / name, place / f"{name}.json"
    version = {"index": INDEX_VERSION, **folder.version(name)}
    known = read_json(index) if index.is_file() else {}
    if known.get("version") != version or not path.is_file() or path.stat().st_size != known["size"]:
        index.parent.mkdir(parents=True, exist_ok=True)
        index.unlink(missing_ok=True)  # it must not outlive the copy that it describes
        if local is None:
            log.info("copying %s to %s", folder.where(name), path)
            folder.download(name, path, version["bytes"])
        known = {"version": version, "size": path.stat().st_size, "entries": index_tar(path, folder.where(name))}
        write_atomic(index, json.dumps(known))
    return path, known["entries"]


def index_tar(path: Path, where: str = "", labelled: bool = True) -> list[Entry]:
    """The pictures of a tar in their order. UserError, with `where` it is, when it is malformed or not whole.

    Members are named as WebDataset does: the key ends at the first dot of the file name. Members that are neither
    picture nor label are left alone, but for pickles: shards that contain one are not read.
    labelled: whether every picture must have a label; otherwise none is read, and all are -1.
    """
    where = where or str(path)
    check_regular(path)
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, dict[str, bytes]] = {}
    with open(path, "rb") as file:
        for member in _members(file, where):
            folder, slash, file_name = member.name.rpartition("/")
            stem, _, extension = file_name.partition(".")
            key, extension = folder + slash + stem, extension.lower()
            if extension.rpartition(".")[2] in PICKLE_EXTENSIONS:
                raise UserError(f"{where}:{member.name} is a pickle, which can run code: remove it from the shard")
            if extension in IMAGE_EXTENSIONS:
                if key in pictures:
                    raise UserError(f"{where} has two pictures of sample {key}: make keys unique")
                pictures[key] = member.name, member.offset_data, member.size
            elif extension in ("cls", "json") and not stem.startswith("__"):
                file.seek(member.offset_data)
                labels.setdefault(key, {})[extension] = file.read(member.size)
    if not pictures:
        raise UserError(f"no pictures in {where}: expected members KEY.{'|'.join(IMAGE_EXTENSIONS)} and KEY.cls")
    for key in labels:
        if key not in pictures:
            raise UserError(f"sample {key} of {where} has no picture: expected {key}.{'|'.join(IMAGE_EXTENSIONS)}")
    samples = [(picture, labels.get(key, {}), f"sample {key} of {where}") for key, picture in pictures.items()]
    return [(*picture, _label(found, sample) if labelled else -1) for picture, found, sample in samples]


def _members(file: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    """Regular files of an uncompressed tar. UserError at the end if what follows isn't zeros, as in every whole tar:

    `tarfile` itself takes a damaged header for the end.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    yield member
            end = tar.offset
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{where} is not a complete, uncompressed tar ({error}): copy or make it again") from None
    file.seek(end)
    zeros = 0
    while (block := file.read(BLOCK)) and not block.strip(b"\0"):
        zeros += len(block)
    if block or zeros < tarfile.BLOCKSIZE:
        raise UserError(f"{where} is damaged or breaks off at byte {end}: copy or make it again")


def _label(found: dict[str, bytes], sample: str) -> int:
    if not found:
        raise UserError(f'{sample} has no label: add KEY.cls with an integer, or KEY.json with "label"')
    try:
        label = int(found["cls"]) if "cls" in found else json.loads(found["json"])["label"]
        if type(label) is not int or not 0 <= label < 2**31:
            raise ValueError(label)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the label of {sample} is not an integer from 0 ({type(error).__name__}: {error})") from None
    return label
