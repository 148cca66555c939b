"""References to weights: a run name, name@checkpoint, a folder or a file; what is missing is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ssdd.engine import checkpoint
from ssdd.engine.errors import UserError


@pytest.fixture
def runs(tmp_path) -> Path:
    """A ckpt_dir with the run "full" (last with EMA, best without) and the run "begun" (no checkpoint yet)."""
    tensors = {"w": torch.ones(4)}
    checkpoints = tmp_path / "runs" / "jobs" / "full" / "checkpoints"
    checkpoint.save(checkpoints / "last", {"model": tensors, "model_ema": tensors, "optimizer": {}}, {})
    checkpoint.save(checkpoints / "best", {"model": tensors}, {})
    (tmp_path / "runs" / "jobs" / "begun").mkdir()
    return tmp_path / "runs"


def test_a_run_name_means_the_averaged_weights_of_its_last_checkpoint(runs):
    checkpoints = runs / "jobs" / "full" / "checkpoints"
    assert checkpoint.resolve("full", runs) == checkpoints / "last" / "model_ema.safetensors"
    assert checkpoint.resolve("full@last", str(runs)) == checkpoints / "last" / "model_ema.safetensors"
    assert checkpoint.resolve("full@best", runs) == checkpoints / "best" / "model.safetensors"


def test_a_directory_or_a_file_may_be_named(runs, monkeypatch):
    folder = runs / "jobs" / "full"
    expected = folder / "checkpoints" / "last" / "model_ema.safetensors"
    assert checkpoint.resolve(str(folder), runs) == expected
    assert checkpoint.resolve(str(folder / "checkpoints" / "last"), "elsewhere") == expected
    assert checkpoint.resolve(str(expected), "elsewhere") == expected
    monkeypatch.chdir(expected.parent)
    assert checkpoint.resolve("model.safetensors", "elsewhere") == Path("model.safetensors")
    monkeypatch.chdir(folder.parent)
    assert checkpoint.resolve("full", "elsewhere") == Path("full/checkpoints/last/model_ema.safetensors")


@pytest.mark.parametrize("averaged", ["model_ae_ema.safetensors", "model_1.safetensors"])
def test_in_official_folders_too_averaged_weights_are_preferred(tmp_path, averaged):
    for name in ("model.safetensors", averaged):
        checkpoint.save_tensors(tmp_path / "official" / name, {"w": torch.ones(1)})
    assert checkpoint.resolve(str(tmp_path / "official"), tmp_path).name == averaged


def test_a_run_whose_writer_was_killed_between_its_renames_is_found(runs):
    last = runs / "jobs" / "full" / "checkpoints" / "last"
    last.rename(last.with_name("last.old"))
    assert checkpoint.resolve("full", runs).parent.name == "last.old"
    shutil.copytree(last.with_name("last.old"), last.with_name("last.new"))
    assert checkpoint.resolve("full", runs).parent.name == "last.new"


def refusal(reference: str, runs: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.resolve(reference, runs)
    return str(caught.value)


def test_a_reference_to_nothing_lists_what_was_looked_for_and_what_there_is(runs):
    message = refusal("fulll", runs)
    assert str(runs / "jobs" / "fulll" / "checkpoints" / "last") in message
    assert "model_ema.safetensors" in message
    assert message.endswith("begun, full")
    assert refusal("full@first", runs).endswith("there is full@best, full@last")
    assert refusal("begun", runs).endswith("begun, full")
    assert str(runs / "no.safetensors") in refusal(str(runs / "no.safetensors"), runs)
    assert refusal("x", runs / "empty").endswith("none")
    (runs / "x.txt").write_bytes(b"")
    assert "not a weights file" in refusal(str(runs / "x.txt"), runs)
    assert "empty checkpoint reference" in refusal("", runs)
