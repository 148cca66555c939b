"""Full and read-only targets, damaged labels, another tokenizer: each is reported in one line, and can be mended."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from latent_cache import LatentDataset
from latent_cache.config import StatsConfig
from latent_cache.diagnose import stats
from latent_cache.peers.export import ExportConfig, export
from latent_cache.peers.formats import FORMATS
from latent_cache.peers.importing import ImportConfig, import_latents
from latent_cache.verify import verify
from latent_cache.write import build as build_module
from latent_cache.write.build import build
from ssdd.engine.errors import UserError
from ssdd.model.latent import LatentNorm
from ssdd.model.tokenizer import SSDD
from tests.kills import files

Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """mount("size=1m") is a small disk of its own. Skips where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root; modes of a folder do not stop root, and a build runs as either")
    disk = tmp_path / "disk"
    disk.mkdir()

    def make(options: str) -> Path:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("no tmpfs can be mounted here")
        return disk

    yield make
    if os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the space there is but for a page."""
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(bytes(free - 4096))
    return ballast


def filling(disk: Path, step: Callable) -> Callable:
    """`step`, but somebody else fills the disk before it begins."""

    def run(*given: object) -> object:
        fill(disk)
        return step(*given)

    return run


def test_a_disk_that_somebody_fills_is_told_and_the_build_goes_on_when_there_is_room(
    means, settings, mount, monkeypatch
):
    disk = mount("size=1m")
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "encode_shards", filling(disk, build_module.encode_shards))
        with pytest.raises(UserError, match=r"out=.*No space left on device.*make room and run the same command again"):
            build(settings(disk / "cache"))
    (disk / "ballast").unlink()
    build(settings(disk / "cache"))
    assert files(disk / "cache") == files(means)


def test_a_disk_too_small_is_told_before_the_first_image(settings, mount, monkeypatch):
    disk = mount("size=64k")
    monkeypatch.setattr(build_module, "encode_shards", None)
    with pytest.raises(UserError, match=r"the cache takes .* GB while it is built, only .* GB are free"):
        build(settings(disk / "cache"))


@pytest.mark.parametrize("layout", FORMATS)
def test_an_export_tells_a_full_disk_and_goes_on(moments, mount, tmp_path, layout, monkeypatch):
    disk = mount("size=2m")
    peer = FORMATS[layout]
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, layout, replace(peer, write=filling(disk, peer.write)))
        with pytest.raises(UserError, match=r"No space left on device.*make room and run the same command again"):
            export(ExportConfig(str(moments), layout, str(disk / "out")))
    (disk / "ballast").unlink()
    export(ExportConfig(str(moments), layout, str(disk / "out")))
    export(ExportConfig(str(moments), layout, str(tmp_path / "straight")))
    assert files(disk / "out") == files(tmp_path / "straight")


def test_an_export_too_large_for_its_disk_is_told_before_the_first_file(moments, mount):
    disk = mount("size=4k")
    with pytest.raises(UserError, match=r"the export takes .* GB, only .* GB are free"):
        export(ExportConfig(str(moments), "lightningdit", str(disk / "out")))


def test_a_read_only_target_is_told_before_the_first_image(means, settings, mount, tmp_path, monkeypatch):
    disk = mount("size=1m,ro")
    export(ExportConfig(str(means), "repa", str(tmp_path / "there")))
    monkeypatch.setattr(build_module, "encode_shards", None)
    attempts = [
        lambda: build(settings(disk / "cache")),
        lambda: export(ExportConfig(str(means), "repa", str(disk / "out"))),
        lambda: import_latents(ImportConfig("repa", str(tmp_path / "there"), str(disk / "back"))),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match=r"Read-only file system.*choose a folder for out= that can be written"):
            attempt()


def test_a_finished_cache_on_a_read_only_disk_is_read_and_found_finished(means, settings, mount):
    disk = mount("size=1m")
    build(settings(disk / "cache"))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert verify(disk / "cache") == []
    assert LatentDataset(disk / "cache").gather(range(60))[0].isfinite().all()
    build(settings(disk / "cache"))


def test_a_damaged_label_is_told_when_labels_are_read(means, tmp_path):
    folder = Path(shutil.copytree(means, tmp_path / "cache"))
    tar = folder / "train/000001.tar"
    data = bytearray(tar.read_bytes())
    member = re.search(rb"000000020\.cls", data).start()
    data[member + 512] ^= 0x40  # "0".."9" -> "p".."y"
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"000001\.tar: a label is not a whole number.*verify"):
        _ = LatentDataset(folder).labels
    with pytest.raises(UserError, match=r"000001\.tar: a label is not a whole number"):
        stats(StatsConfig(str(folder)))
    assert len(verify(folder)) == 1


def test_statistics_are_refused_by_every_tokenizer_but_their_own(means, tokenizer, tmp_path):
    own = SSDD.from_pretrained(tokenizer)
    LatentNorm.load(means / "z_stats.json", own.encoder_fingerprint())
    other = SSDD({"name": "f8c2", "width": 16}, "XXS")
    for refused in (
        lambda: LatentNorm.load(means / "z_stats.json", other.encoder_fingerprint()),
        lambda: LatentDataset(means, fingerprint=other.encoder_fingerprint()),
    ):
        with pytest.raises(UserError, match="statistics of another encoder .*load their own encoder"):
            refused()


def test_another_tokenizer_does_not_continue_a_build(settings, tmp_path, monkeypatch):
    small = {"dataset": {"limit": 10}}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module, "normalise_shards", interrupt)
        build(settings(tmp_path / "cache", **small))
    SSDD({"name": "f8c2", "width": 16}, "XXS").save_pretrained(tmp_path / "other")
    changed = replace(settings(tmp_path / "cache", **small), tokenizer=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"unfinished build with other settings \(tokenizer\.fingerprint"):
        build(changed)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
