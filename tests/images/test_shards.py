"""Shards that the webdataset library wrote are the same data set as the same pictures in folders."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from latent_cache.__main__ import main as latent_cache_main
from latent_cache.read.dataset import LatentDataset
from ssdd.engine import remote as remote_module
from ssdd.engine.errors import UserError
from ssdd.images import shards
from ssdd.images.batches import eval_batches, train_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.shards import index_tar
from ssdd.images.sources import DatasetConfig, open_source
from ssdd.main import main as ssdd_main
from tests.images.pictures import picture, write_tar
from tests.small_tokenizer import ARGUMENTS, save_encoder

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "val")
PER_SHARD = 16


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 digits a split, as `folder/SPLIT/CLASS/*.png` and, in the same order, as `shards/SPLIT/*.tar`."""
    import webdataset

    root = tmp_path_factory.mktemp("digits")
    for split in SPLITS:
        source = open_source(DatasetConfig(source="digits", im_size=20, limit=40), split)
        for i, label in enumerate(source.labels):
            path = root / "folder" / split / str(label) / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.image(i).save(path)
        files = sorted((root / "folder" / split).rglob("*.png"))
        (root / "shards" / split).mkdir(parents=True)
        for shard, first in enumerate(range(0, len(files), PER_SHARD)):
            with webdataset.TarWriter(str(root / "shards" / split / f"{shard:06d}.tar")) as tar:
                for path in files[first : first + PER_SHARD]:
                    label = int(path.parent.name)
                    # label in one of the two notations: the writer makes ASCII of "cls" and JSON of "json"
                    notation = {"cls": label} if label % 2 else {"json": {"label": label, "source": "digits"}}
                    tar.write({"__key__": path.stem, "png": path.read_bytes(), **notation})
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote_module, "PAUSE", 0.0)
    return tmp_path / "home" / "ssdd" / "shards"


@pytest.fixture
def memory(digits: Path):
    """The shards on a remote file system."""
    remote = fsspec.filesystem("memory")
    remote.put(str(digits / "shards"), "/bucket/digits", recursive=True)
    yield remote
    remote.rm("/bucket", recursive=True)


def settings(root: object, **changes: object) -> DatasetConfig:
    return DatasetConfig(source="webdataset", root=str(root), im_size=16, aug_scale=1.2, **changes)


def folder_settings(digits: Path) -> DatasetConfig:
    return replace(settings(digits / "folder"), source="imagefolder")


def batches(cfg: DatasetConfig, steps: int, **options: int) -> list:
    images = ImageDataset(open_source(cfg, "train"), cfg, train=True, seed=3)
    return list(itertools.islice(train_batches(images, 8, seed=3, **options), steps))


def assert_equal(first: list, second: list) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True))


def pictures(cfg: DatasetConfig, split: str) -> list[tuple[bytes, int]]:
    source = open_source(cfg, split)
    return [(source.image(i).tobytes(), int(source.labels[i])) for i in range(len(source))]


# The same data set


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_those_of_the_same_pictures_in_folders(digits, workers, world):
    for rank in range(world):
        options = {"rank": rank, "world": world, "workers": workers}
        expected = batches(folder_settings(digits), 7, **options)
        assert_equal(expected, batches(settings(digits / "shards"), 7, **options))


def test_evaluation_batches_are_those_of_the_same_pictures_in_folders(digits):
    both = [folder_settings(digits), settings(digits / "shards")]
    images = [ImageDataset(open_source(cfg, "val"), cfg, train=False) for cfg in both]
    assert_equal(*(list(eval_batches(each, 12, rank=1, world=2)) for each in images))


def test_class_names_are_those_of_classes_txt_or_else_numbers(digits, tmp_path):
    write_tar(tmp_path / "train/0.tar", {"a.png": picture(), "a.cls": b"1\n"})
    assert open_source(settings(tmp_path), "train").class_names == ["0", "1"]
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    assert open_source(settings(tmp_path), "train").class_names == ["ant", "bee", "cat"]
    (tmp_path / "classes.txt").write_text("ant\n")
    with pytest.raises(UserError, match=r"0\.tar:a\.png has label 1, but .*classes\.txt names 1$"):
        open_source(settings(tmp_path), "train")


def test_the_fingerprint_follows_the_pictures_and_not_their_place_or_shards(digits, tmp_path, memory):
    found = open_source(settings(digits / "shards"), "train").fingerprint()
    assert found == open_source(settings("memory://bucket/digits"), "train").fingerprint()
    one = {}
    for path in sorted((digits / "shards/train").iterdir()):
        with tarfile.open(path) as tar:
            one |= {member.name: tar.extractfile(member).read() for member in tar}
    write_tar(tmp_path / "one/train/all.tar", one)
    assert found == open_source(settings(tmp_path / "one"), "train").fingerprint()
    name = next(name for name in one if name.endswith(".png"))
    write_tar(tmp_path / "one/train/all.tar", one | {name: picture()})
    assert found != open_source(settings(tmp_path / "one"), "train").fingerprint()


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_every_kind_of_picture_is_read_and_other_members_are_left_alone(tmp_path, extension):
    content = io.BytesIO()
    pixels = np.add.outer(np.arange(24), np.arange(24)).astype(np.uint8)
    Image.fromarray(pixels).save(content, {"jpg": "jpeg"}.get(extension.lower(), extension))
    members = {f"a/x.{extension}": content.getvalue(), "a/x.cls": b"4", "a/x.txt": b"caption", "a/x.mask.png": b""}
    write_tar(tmp_path / "val/0.tar", members)
    source = open_source(settings(tmp_path), "val")
    expected = Image.open(content).convert("RGB").tobytes()
    assert [source.image(0).tobytes(), *source.labels] == [expected, 4]
    assert source.where(0) == f"{tmp_path}/val/0.tar:a/x.{extension}"


# Where shards are


def test_a_pattern_names_the_shards_of_both_splits(digits, tmp_path):
    for split, path in ((s, p) for s in SPLITS for p in (digits / "shards" / s).iterdir()):
        (tmp_path / f"wds-{split}-{path.name}").symlink_to(path)
    pattern = f"{tmp_path}/wds-{{train-{{000000..000002}},val-{{000000..000002}}}}.tar"
    for split in SPLITS:
        assert pictures(settings(pattern), split) == pictures(folder_settings(digits), split)
    first = f"{tmp_path}/wds-train-{{000000..000001}}.tar"
    assert pictures(settings(first), "train") == pictures(folder_settings(digits), "train")[: 2 * PER_SHARD]
    with pytest.raises(UserError, match="no shard of split val among wds-train-000000.tar ... wds-train-000001.tar"):
        open_source(settings(first), "val")
    with pytest.raises(UserError, match=r"wds-train-000003\.tar is missing"):
        open_source(settings(f"{tmp_path}/wds-train-{{000000..000003}}.tar"), "train")


@pytest.mark.parametrize("root", ["memory://bucket/digits", "memory://bucket/digits/{train,val}/00000{0..2}.tar"])
def test_remote_shards_are_copied_once_and_give_the_same_batches(digits, memory, own_cache, monkeypatch, root):
    expected = batches(folder_settings(digits), 6)
    assert_equal(expected, batches(settings(root), 6))
    assert len(list(own_cache.rglob("*.tar"))) == 3
    monkeypatch.setattr(remote_module.RemoteFolder, "download", lambda *_: pytest.fail("downloaded again"))
    monkeypatch.setattr(shards, "index_tar", lambda *_: pytest.fail("gone through again"))
    assert_equal(expected, batches(settings(root), 6))


def test_a_remote_shard_that_was_replaced_is_copied_again(memory, tmp_path):
    cfg = settings("memory://bucket/digits", cache_dir=str(tmp_path / "copies"))
    assert len(open_source(cfg, "train")) == 40
    tar = write_tar(tmp_path / "new.tar", {"new.png": picture(), "new.cls": b"0"})
    memory.put(str(tar), "/bucket/digits/train/000001.tar")
    assert len(open_source(cfg, "train")) == 40 - PER_SHARD + 1


def test_a_local_shard_that_was_replaced_is_gone_through_again(tmp_path):
    tar = write_tar(tmp_path / "train/0.tar", {"a.png": picture(), "a.cls": b"0"})
    assert open_source(settings(tmp_path), "train").labels.tolist() == [0]
    write_tar(tar, {"a.png": picture(), "a.cls": b"1"})
    os.utime(tar, ns=(0, 0))
    assert open_source(settings(tmp_path), "train").labels.tolist() == [1]


def test_a_download_that_breaks_off_is_made_again(digits, memory, monkeypatch):
    original, calls = remote_module.RemoteFolder.open, []

    def opened(remote, name):
        calls.append(name)
        file = original(remote, name)
        return io.BytesIO(file.read()[:-512]) if calls.count("train/000001.tar") == 1 else file

    monkeypatch.setattr(remote_module.RemoteFolder, "open", opened)
    cfg = settings("memory://bucket/digits")
    assert pictures(cfg, "train") == pictures(folder_settings(digits), "train")
    assert calls.count("train/000001.tar") == 2


def test_of_processes_that_open_the_same_shards_one_goes_through_them(digits, tmp_path):
    program = (
        "import sys; from ssdd.images import shards; original = shards.index_tar\n"
        "def index_tar(path, where): sys.stdout.write(path.name + chr(10)); return original(path, where)\n"
        "shards.index_tar = index_tar; assert len(shards.open_shards(sys.argv[1], 'train', sys.argv[2])[1]) == 40\n"
    )
    command = [sys.executable, "-c", program, str(digits / "shards"), str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = "".join(process.communicate()[0] for process in processes).split()
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(names) == [f"{number:06d}.tar" for number in range(3)]


# Mistakes


@pytest.mark.parametrize("root", ["pipe:cat train.tar", "pipe:curl -s URL/{train,val}.tar", " pipe:true"])
def test_commands_are_refused(root):
    with pytest.raises(UserError, match="commands are not run"):
        open_source(settings(root), "train")


def test_a_missing_root_folder_or_split_is_an_error_that_says_the_layout(digits, tmp_path):
    (tmp_path / "train").mkdir()
    write_tar(tmp_path / "half/train/0.tar", {"a.png": picture(), "a.cls": b"0"})
    for root, split in ((tmp_path, "train"), (tmp_path / "absent", "train"), (tmp_path / "half", "val")):
        with pytest.raises(UserError, match=rf"no shards at {root}/{split}/\*\.tar: expected .*/val/\*\.tar"):
            open_source(settings(root), split)
    for root in ("memory://nothing", "nonsense://x"):
        with pytest.raises(UserError, match=root):
            open_source(settings(root), "train")


def test_a_cache_folder_that_cannot_be_written_is_an_error(digits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Set dataset.cache_dir=FOLDER"):
        open_source(settings(digits / "shards", cache_dir=str(tmp_path / "file/x")), "train")


THREE = {f"{key}.{extension}": content for key in "abc" for extension, content in (("png", picture()), ("cls", b"1"))}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda tar: b"no tar at all" * 100, id="something else"),
        pytest.param(gzip.compress, id="compressed"),
        pytest.param(lambda tar: tar.replace(b"b.png", b"q.png"), id="a damaged header"),
        pytest.param(lambda tar: tar[:2048] + bytes(2048) + tar[4096:], id="a hole"),
    ],
)
def test_a_damaged_shard_is_an_error_with_its_path(tmp_path, damage):
    tar = write_tar(tmp_path / "train/000007.tar", THREE)
    tar.write_bytes(damage(tar.read_bytes()))
    with pytest.raises(UserError, match=rf"{tar} is (damaged|not a complete)"):
        open_source(settings(tmp_path), "train")


def test_a_shard_that_breaks_off_anywhere_is_an_error(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", THREE)
    content, tar = whole.read_bytes(), tmp_path / "part.tar"
    with tarfile.open(whole) as opened:
        end = max(member.offset_data + 512 for member in opened)
    assert len(index_tar(whole)) == 3
    for size in (*range(0, end, 128), end, end + 511):
        tar.write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"{tar} is (damaged|not a complete)"):
            index_tar(tar)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": picture()}, "sample a of .*0.tar has no label: add KEY.cls"),
        ({"a.png": picture(), "a.json": b'{"caption": "x"}'}, r"label of sample a .*\(KeyError: 'label'"),
        ({"a.png": picture(), "a.json": b'{"label": "dog"}'}, "label of sample a .* dog"),
        ({"a.png": picture(), "a.json": b"[1"}, r"label of sample a .*\(JSONDecodeError"),
        ({"a.png": picture(), "a.cls": b"dog"}, "label of sample a .*dog"),
        ({"a.png": picture(), "a.cls": b"9" * 20}, "label of sample a .* 9{20}"),
        ({"a.png": picture(), "a.cls": b"-1"}, "label of sample a .* -1"),
        ({"a.png": picture(), "a.jpg": picture(), "a.cls": b"1"}, "two pictures of sample a"),
        ({"a.png": picture(), "a.cls": b"1", "b.cls": b"1"}, "sample b of .* has no picture"),
        ({"readme.txt": b"hello"}, "no pictures in .*0.tar"),
        ({"a.png": picture(), "a.pyd": b"\x80\x04."}, "a.pyd is a pickle"),
        ({"a.png": picture(), "a.cls": b"1", "a.meta.pkl": b"\x80\x04."}, "a.meta.pkl is a pickle"),
    ],
)
def test_a_malformed_sample_is_an_error_that_names_it(tmp_path, members, message):
    write_tar(tmp_path / "train/0.tar", members)
    with pytest.raises(UserError, match=message):
        open_source(settings(tmp_path), "train")


# Programs


def test_a_tokenizer_trained_on_shards_is_that_trained_on_folders(digits, tmp_path):
    pattern = f"{digits}/shards/{{train,val}}/{{000000..000002}}.tar"
    for source, root in (("imagefolder", digits / "folder"), ("webdataset", pattern)):
        data = [f"dataset.source={source}", f"dataset.root={root}"]
        assert ssdd_main([*ARGUMENTS, *data, f"ckpt_dir={tmp_path}", f"run_name={source}", "training.steps=1"]) == 0
    runs = [
        tmp_path / "jobs" / source / "checkpoints/last/model.safetensors" for source in ("imagefolder", "webdataset")
    ]
    assert runs[0].read_bytes() == runs[1].read_bytes()


def test_a_latent_cache_of_shards_is_that_of_folders(digits, tmp_path):
    tokenizer, caches = save_encoder(tmp_path / "tokenizer"), []
    for cfg in (folder_settings(digits), settings(digits / "shards")):
        out = tmp_path / cfg.source
        arguments = [f"tokenizer={tokenizer}", f"dataset.source={cfg.source}", f"dataset.root={cfg.root}"]
        small = ["dataset.im_size=16", "samples_per_shard=16", "batch_size=8", "device=cpu"]
        assert latent_cache_main(["build", *arguments, *small, f"out={out}"]) == 0
        caches.append(LatentDataset(out, verify="full"))
    for latents in zip(*(cache.gather(range(40)) for cache in caches), strict=True):
        assert torch.equal(*latents)
    assert caches[0].class_names == caches[1].class_names
