"""A layout for exports is one entry of a table: the help, the choices, the export and its record follow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from latent_cache.__main__ import main
from latent_cache.peers.exchange import Block, PeerFormat, Samples
from latent_cache.peers.formats import FORMATS
from tests.latent_cache.synthetic import make_cache


def names(samples: Samples) -> list[str]:
    return [f"block-{samples.number}.npy"]


def write(paths: list[Path], block: Block, seed: int) -> None:
    np.save(paths[0], block.drawn(0, seed).numpy())


STACKED = PeerFormat(
    project="Stacked",
    holds="all samples of a block in one array",
    block=8,
    names=names,
    size=lambda shape, count: count * int(np.prod(shape)) * 4,
    write=write,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """12 latents, and the format "stacked" to export them to."""
    monkeypatch.setitem(FORMATS, "stacked", STACKED)
    return make_cache(tmp_path / "cache", np.random.default_rng(0).standard_normal((12, 2, 4, 4)))


def test_the_help_has_it_and_import_which_can_not_read_it_has_not(cache, capsys):
    assert main(["export", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "REPA, MAR or Stacked" in text and "stacked: all samples of a block in one array (seed=)" in text
    assert "format (fast-dit | lightningdit | repa | mar | stacked; required)" in text
    assert main(["import", "--help"]) == 0
    assert "stacked" not in capsys.readouterr().out


def test_a_cache_is_exported_to_it(cache, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", f"cache={cache}", "format=stacked", f"out={out}"]) == 0
    assert "12 latents of train as stacked, 1536 bytes" in capsys.readouterr().out
    assert [len(np.load(path)) for path in sorted(out.glob("*.npy"))] == [8, 4]
    assert json.loads((out / "export.json").read_text())["layout"] == "stacked"


def test_a_name_near_it_is_an_error_that_lists_it(cache, capsys):
    assert main(["export", f"cache={cache}", "format=stackd", "out=x"]) == 2
    assert "stacked" in capsys.readouterr().err
    assert main(["import", "format=stacked", "source=a", "out=b"]) == 2
    assert "must be one of fast-dit, lightningdit, repa" in capsys.readouterr().err
