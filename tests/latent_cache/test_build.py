"""A build holds every image once, exactly, whatever happens to it on the way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from latent_cache import LatentDataset
from latent_cache.config import ViewsConfig
from latent_cache.write import build as build_module
from latent_cache.write.build import build
from latent_cache.write.folder import lock_of
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json
from tests.kills import Command, files, later_and_later
from tests.latent_cache.straight import posteriors

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def arguments(tokenizer: Path, out: Path) -> list[str]:
    """The settings of the cache `means` as they are written on the command line."""
    dataset = ["dataset.source=digits", "dataset.im_size=16", "dataset.limit=60"]
    return [f"tokenizer={tokenizer}", f"out={out}", *dataset, "samples_per_shard=16", "batch_size=8", "device=cpu"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_row_and_label_is_that_of_a_straight_loop_over_the_data(means, settings, tokenizer, split):
    expected, _, labels = posteriors(tokenizer, settings("").dataset, split)
    cache = LatentDataset(means, split)
    latents, found = cache.gather(range(60))
    assert len(cache) == 60
    assert torch.equal(found, labels)
    assert torch.allclose(latents, cache.norm.normalise(expected), atol=4e-3)  # float16 of values up to about 4


def test_statistics_equal_a_direct_float64_computation(means, settings, tokenizer):
    raw = posteriors(tokenizer, settings("").dataset, "train")[0].double()
    stats = read_json(means / "z_stats.json")
    assert np.allclose(stats["mean"], raw.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    assert np.allclose(stats["std"], raw.std((0, 2, 3), correction=0), rtol=1e-6)
    assert np.isclose(stats["z_mean"], raw.mean(), rtol=1e-6)
    assert np.isclose(stats["z_std"], raw.std(correction=0), rtol=1e-6)
    assert stats["count"] == 60


def test_statistics_of_moments_are_those_of_the_sampled_latent_over_all_views(moments, settings, tokenizer):
    views = [posteriors(tokenizer, settings("").dataset, "train", flip) for flip in (False, True)]
    mean, logvar = (torch.cat(part).double() for part in list(zip(*views, strict=True))[:2])
    variance = mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))
    stats = read_json(moments / "z_stats.json")
    assert np.allclose(stats["mean"], mean.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    assert np.allclose(stats["std"], variance.sqrt(), rtol=1e-6)
    assert np.isclose(stats["z_std"], (mean.var(correction=0) + logvar.exp().mean()).sqrt(), rtol=1e-6)
    assert stats["count"] == 120


def test_two_processes_write_the_same_bytes_as_one(means, tokenizer, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "latent_cache",
    ]
    command += ["build", *arguments(tokenizer, tmp_path / "cache")]
    subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert files(tmp_path / "cache") == files(means)


def test_a_build_killed_again_and_again_ends_with_the_same_bytes(means, tokenizer, tmp_path):
    late = ("sklearn.datasets", "latent_cache.write.build")
    build = Command("latent_cache", ["build", *arguments(tokenizer, tmp_path / "cache")], imports=late)
    assert build.run(later_and_later(first=7, step=5)).kills >= 5
    assert files(tmp_path / "cache") == files(means)


def test_the_manifest_names_neither_paths_nor_the_decoder(means, tokenizer):
    text = (means / "manifest.json").read_text()
    assert str(tokenizer) not in text and str(means) not in text and "XXS" not in text


def test_a_finished_cache_is_found_at_once_and_left_alone(means, settings, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in means.rglob("*")}
    monkeypatch.setattr(build_module, "encode_shards", None)
    manifest = build(settings(means))
    assert manifest == read_json(means / "manifest.json")
    assert {path: path.stat().st_mtime_ns for path in means.rglob("*")} == before


def test_other_settings_are_refused_by_name_until_overwrite_is_given(settings, tmp_path):
    build(settings(tmp_path, dataset={"limit": 10}))
    with pytest.raises(UserError, match=r"content: mean, wanted moments.*overwrite=true"):
        build(settings(tmp_path, dataset={"limit": 10}, content="moments"))
    assert LatentDataset(tmp_path).manifest["content"] == "mean"
    build(settings(tmp_path, dataset={"limit": 10}, content="moments", overwrite=True))
    assert LatentDataset(tmp_path, verify="full").manifest["content"] == "moments"


@pytest.mark.parametrize("name", ["train/000000.tar", "manifest.json", "z_stats.json"])
def test_a_damaged_cache_is_not_taken_for_a_finished_one(settings, tmp_path, name):
    small = {"dataset": {"limit": 10}, "splits": ["train"]}
    build(settings(tmp_path, **small))
    whole = files(tmp_path)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UserError, match="holds a damaged cache .*overwrite=true"):
        build(settings(tmp_path, **small))
    build(settings(tmp_path, **small, overwrite=True))
    assert files(tmp_path) == whole


def test_an_unfinished_build_of_other_settings_is_refused(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module, "normalise_shards", interrupt)
        build(settings(tmp_path, dataset={"limit": 10}))
    with pytest.raises(UserError, match="unfinished build .*samples_per_shard: 16, wanted 5"):
        build(settings(tmp_path, dataset={"limit": 10}, samples_per_shard=5))
    build(settings(tmp_path, dataset={"limit": 10}, samples_per_shard=5, overwrite=True))
    assert LatentDataset(tmp_path, verify="full").manifest["samples_per_shard"] == 5


def test_the_manifest_has_the_cpu_capability_that_its_bytes_depend_on(settings, tmp_path, monkeypatch):
    small = {"dataset": {"limit": 10}}
    monkeypatch.setattr("ssdd.engine.precision.cpu_capability", lambda: "AVX2")
    cfg = settings(tmp_path / "cache", **small)
    assert build(cfg)["encoding"]["precision"] == {"mixed_precision": "no", "why": "always float32", "cpu": "AVX2"}
    unfinished = settings(tmp_path / "unfinished", **small)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module, "normalise_shards", interrupt)
        build(unfinished)
    monkeypatch.setattr("ssdd.engine.precision.cpu_capability", lambda: "AVX512")
    assert build(cfg)["encoding"]["precision"]["cpu"] == "AVX2"  # finished: nothing is left to encode
    with pytest.raises(UserError, match=r"unfinished build .*encoding\.precision\.cpu: AVX2, wanted AVX512"):
        build(unfinished)


def test_what_killed_processes_left_is_removed_before_the_build_goes_on(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module, "normalise_shards", interrupt)
        build(settings(tmp_path, dataset={"limit": 10}))
    leftover = tmp_path / ".partial/train/000000.4711.npy.tmp"
    leftover.write_bytes(bytes(1000))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module, "normalise_shards", interrupt)
        build(settings(tmp_path, dataset={"limit": 10}))
    assert not leftover.exists() and (tmp_path / ".partial/train/000000.npy").is_file()


def test_a_machine_that_does_not_see_the_folder_is_told_to_share_it(tmp_path):
    with pytest.raises(UserError, match="all machines of a build must share the disk of out="):
        lock_of(tmp_path / "elsewhere")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_that_is_no_cache_is_never_touched(settings, tmp_path):
    picture = tmp_path / "train" / "000000.tar"
    picture.parent.mkdir()
    picture.write_text("mine")
    with pytest.raises(UserError, match="holds train but no cache"):
        build(settings(tmp_path, overwrite=True))
    assert picture.read_text() == "mine"


def test_mirrored_views_are_refused_where_a_mirror_image_is_no_image(settings, tmp_path):
    with pytest.raises(UserError, match=r"views\.flip=true.*digits"):
        build(replace(settings(tmp_path), views=ViewsConfig(flip=True)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"splits": ["val"]}, r"splits=\[val\]"),
        ({"dataset": {"im_size": 20}}, "im_size=20 is not a multiple of 8"),
        ({"device": "cuda"}, "no usable GPU"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(settings, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        build(settings(tmp_path, **changes))


def test_a_disk_too_small_is_found_before_the_first_image(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(build_module, "encode_shards", None)
    with pytest.raises(UserError, match=r"only 0\.00 GB are free"):
        build(settings(tmp_path))


def test_a_disk_that_fills_up_is_a_clear_error_and_the_build_goes_on_later(means, settings, tmp_path, monkeypatch):
    calls, fsync = iter(range(40)), os.fsync

    def fill_up(descriptor: int) -> None:
        if next(calls) == 39:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left.*it will continue"):
        patch.setattr(os, "fsync", fill_up)
        build(settings(tmp_path))
    build(settings(tmp_path))
    assert files(tmp_path) == files(means)


def test_a_target_that_cannot_be_written_is_a_clear_error(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a folder for out= that can be written"):
        build(settings(tmp_path / "file" / "cache"))


def test_unreadable_images_stop_the_build_or_are_left_out_and_counted(settings, tmp_path):
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(6):
            path = tmp_path / "images" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images/train/a/2.png").write_bytes(b"not a picture")
    dataset = {"source": "imagefolder", "root": str(tmp_path / "images"), "limit": None}
    with pytest.raises(UserError, match=r"train/a/2\.png"):
        build(settings(tmp_path / "cache", dataset=dataset))
    build(settings(tmp_path / "skipping", dataset=dataset | {"on_corrupt": "skip"}))
    cache = LatentDataset(tmp_path / "skipping", verify="full")
    assert cache.manifest["splits"]["train"]["skipped"] == [1]
    assert cache.labels.tolist() == [0, 0, 1, 1, 1]
    assert cache.class_names == ["a", "b"]


def test_decoding_in_worker_processes_changes_nothing(means, settings, tmp_path):
    build(settings(tmp_path, dataset={"workers": 1}))
    assert files(tmp_path) == files(means)
