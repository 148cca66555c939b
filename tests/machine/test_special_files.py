"""Named pipes, sockets, devices, folders and broken links in the place of files: one line says so, nothing waits."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit.foreign_checkpoints import load_dit
from latent_cache.peers.importing import ImportConfig, import_latents
from latent_cache.read.dataset import LatentDataset
from ssdd.engine import checkpoint
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, sha256_file
from ssdd.engine.pretrained import load_tensors
from ssdd.fidelity.set_to_measure import SetToMeasure
from ssdd.fidelity.stored_sets import open_set
from ssdd.images.batches import eval_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.shards import open_shards
from ssdd.images.sources import DatasetConfig, open_source
from ssdd.model.weight_files import read_weights


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is at most 107 bytes
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(path.name)
    os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    r"a named pipe \(FIFO\)": os.mkfifo,
    "a socket": listening,
    "a character device": lambda path: path.symlink_to("/dev/zero"),
    "a broken link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link that can't be followed, to ": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
}
WAITING = {kind: make for kind, make in KINDS.items() if "FIFO" in kind or "broken" in kind}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """A test that waits for a pipe's writer fails after ten seconds."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError("still reading after ten seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of two classes with two images a split each; odd files may take the name train/a/1.png."""
    for place in ("train/a/0", "train/b/0", "train/b/1", "val/a/0", "val/b/0"):
        file = tmp_path / "images" / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (len(place), 40, 90)).save(file)
    return tmp_path / "images"


def settings(folder: Path, **changes: object) -> DatasetConfig:
    return DatasetConfig(source="imagefolder", root=str(folder), im_size=16, **changes)


@every_kind
def test_an_image_folder_is_refused_when_it_is_opened_and_the_message_says_what_lies_there(folder, kind):
    KINDS[kind](folder / "train/a/1.png")
    with pytest.raises(UserError, match=rf"train/a/1\.png: it is {kind}.*on_corrupt=skip"):
        open_source(settings(folder), "train")


@every_kind
@pytest.mark.parametrize("workers", [0, 1])
def test_on_corrupt_skip_leaves_it_out_and_counts_it(folder, kind, workers):
    KINDS[kind](folder / "train/a/1.png")
    cfg = settings(folder, on_corrupt="skip")
    dataset = ImageDataset(open_source(cfg, "train"), cfg, train=False)
    read = [index for _, _, indices in eval_batches(dataset, 2, workers=workers) for index in indices.tolist()]
    assert read == [0, 2, 3]
    assert list(dataset.corrupt.values()) == [str(folder / "train/a/1.png")]


@every_kind
def test_the_fingerprint_of_a_folder_says_that_it_lies_there(folder, kind):
    cfg = settings(folder, on_corrupt="skip")
    without = open_source(cfg, "train").fingerprint()
    KINDS[kind](folder / "train/a/1.png")
    odd = open_source(cfg, "train").fingerprint()
    shutil.rmtree(folder / "train/a/1.png") if kind == "a folder" else (folder / "train/a/1.png").unlink()
    shutil.copy(folder / "train/a/0.png", folder / "train/a/1.png")
    assert len({without, odd, open_source(cfg, "train").fingerprint()}) == 3


def test_a_class_whose_folder_is_a_broken_link_is_refused(folder):
    (folder / "val/c").symlink_to("unmounted")
    with pytest.raises(UserError, match="val/c is a broken link to unmounted"):
        open_source(settings(folder), "train")


def test_links_to_images_and_to_folders_of_images_are_followed(folder, tmp_path):
    (folder / "train/a/1.png").symlink_to(folder / "train/b/0.png")
    (folder / "train/c").symlink_to(folder / "train/b")
    source = open_source(settings(folder), "train")
    assert len(source) == 6 and np.array_equal(source.image(1), source.image(2))
    assert len(open_set(folder / "train")) == 6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a folder"])
@pytest.mark.parametrize("name", ["odd.png", "odd.tar"])
def test_a_set_of_images_is_refused(folder, tmp_path, kind, name):
    place = folder if name == "odd.png" else tmp_path / "shards"  # shards are looked at where there are no images
    place.mkdir(exist_ok=True)
    KINDS[kind](place / name)
    with pytest.raises(UserError, match=rf"{name}.* is {kind}"):
        open_set(place)


def test_a_folder_with_an_images_name_in_a_set_is_searched_as_any_other(folder):
    (folder / "train/a").rename(folder / "train/a.png")
    assert len(open_set(folder / "train")) == 3


def test_a_link_to_a_folder_above_it_does_not_count_images_again(folder):
    (folder / "train/again").symlink_to("..")
    with pytest.raises(UserError, match="train/again leads back to .*images"):
        open_set(folder)


def test_shards_and_their_class_names_are_refused(folder, tmp_path):
    for name in ("train/0.tar", "classes.txt"):
        root = tmp_path / Path(name).stem
        (root / "train").mkdir(parents=True)
        (root / "train/0.tar").write_bytes(_shard(folder))
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)
        with pytest.raises(UserError, match=rf"{name} is a named pipe"):
            open_shards(str(root), "train", str(tmp_path / "indices"))


def _shard(folder: Path) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.add(folder / "train/a/0.png", "0.png")
        label = tarfile.TarInfo("0.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"0"))
    return made.getvalue()


READERS: dict[str, Callable[[Path], object]] = {
    "x.npz": open_set,
    "y.npz": SetToMeasure,
    "x.tar": open_set,
    "x.safetensors": read_weights,
    "y.safetensors": SetToMeasure,
    "z.safetensors": lambda path: checkpoint.resolve(str(path), "runs"),
    "u.safetensors": load_dit,
    "x.pt": read_weights,
    "y.pt": SetToMeasure,
    "z.pt": lambda path: checkpoint.resolve(str(path), "runs"),
    "u.pt": load_dit,
    "x.pth": load_tensors,
    "x.json": read_json,
    "x.bin": sha256_file,
    "manifest.json": lambda path: LatentDataset(path.parent),
    "export.json": lambda path: import_latents(ImportConfig("fast-dit", str(path.parent), str(path.parent / "out"))),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", WAITING)
def test_no_reader_of_a_file_waits_for_a_pipe_or_takes_a_broken_link_for_a_missing_file(tmp_path, name, kind):
    WAITING[kind](tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is {kind}, not a regular file: replace or remove it$"):
        READERS[name](tmp_path / name)
