"""Damage of every kind is found, at first use or by `verify`, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from latent_cache import LatentDataset
from latent_cache.verify import verify
from ssdd.engine.errors import UserError


@pytest.fixture
def cache(means: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(means, tmp_path / "cache"))


def change_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_whole_cache_has_no_problems(means, moments):
    assert verify(means) == verify(moments) == []


def test_a_flipped_bit_in_a_latent_is_found_by_its_checksum(cache):
    change_byte(cache / "train/000001.tar", 700)
    assert verify(cache, "quick") == []
    (problem,) = verify(cache, "full")
    assert "train/000001.tar is damaged" in problem
    with pytest.raises(UserError, match=r"000001\.tar is damaged"):
        LatentDataset(cache, verify="full")


def truncate(cache: Path) -> None:
    path = cache / "train/000002.tar"
    path.write_bytes(path.read_bytes()[:-10240])


def exchange(cache: Path) -> None:
    """Another shard of the same size under the name of this one."""
    shutil.copy(cache / "train/000000.tar", cache / "train/000001.tar")


def replace_pair(cache: Path) -> None:
    """The val shard with its sidecar in place of the train shard of the same samples."""
    for suffix in ("tar", "json"):
        shutil.copy(cache / f"val/000001.{suffix}", cache / f"train/000001.{suffix}")


def pickle_header(cache: Path) -> None:
    """A row that says it holds pickled objects."""
    path = cache / "train/000000.tar"
    path.write_bytes(path.read_bytes().replace(b"'<f2'", b"'|O' ", 1))


def drop_sample(cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["splits"]["train"]["count"] = 59
    (cache / "manifest.json").write_text(json.dumps(manifest))


def foreign_statistics(cache: Path) -> None:
    stats = json.loads((cache / "z_stats.json").read_text())
    (cache / "z_stats.json").write_text(json.dumps(stats | {"fingerprint": "0" * 64}))


def scaled_statistics(cache: Path) -> None:
    stats = json.loads((cache / "z_stats.json").read_text())
    (cache / "z_stats.json").write_text(json.dumps(stats | {"std": [2.0, 2.0]}))


DAMAGE = [
    (truncate, r"000002\.tar has 30720 bytes instead of 40960"),
    (lambda cache: (cache / "train/000003.tar").unlink(), r"000003\.tar is missing"),
    (lambda cache: (cache / "train/000003.json").unlink(), r"000003\.json: no such file"),
    (lambda cache: shutil.copy(cache / "train/000000.tar", cache / "train/000004.tar"), r"000004\.tar does not belong"),
    (exchange, r"000001\.tar: sample 16 does not match the manifest"),
    (replace_pair, r"000001\.json does not match the manifest: this shard belongs to another cache"),
    (pickle_header, r"000000\.tar: sample 0 does not match the manifest \(header npy:npy\)"),
    (drop_sample, r"manifest\.json was changed"),
    (foreign_statistics, "statistics of another encoder"),
    (scaled_statistics, r"z_stats\.json is not the file that was built"),
    (lambda cache: (cache / "z_stats.json").write_text("5"), r"z_stats\.json is not a latent statistics file"),
    (lambda cache: (cache / "manifest.json").unlink(), r"manifest\.json is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named_at_first_use(cache: Path, damage: Callable[[Path], object], message: str):
    damage(cache)
    with pytest.raises(UserError, match=message):
        LatentDataset(cache)


def test_verify_lists_all_problems(cache):
    truncate(cache)
    (cache / "val/000000.tar").unlink()
    (cache / "notes.txt").write_text("")
    problems = verify(cache)
    assert len(problems) == 3
    assert "notes.txt" in problems[0] and "train/000002.tar" in problems[1] and "val/000000.tar" in problems[2]


def test_latents_of_another_encoder_are_refused(means):
    with pytest.raises(UserError, match="another encoder"):
        LatentDataset(means, fingerprint="f" * 64)


def test_an_unfinished_build_says_so(tmp_path):
    (tmp_path / ".partial").mkdir()
    with pytest.raises(UserError, match="interrupted, run it again"):
        LatentDataset(tmp_path)
