"""Checkpoint folders: bit for bit, whole or absent whatever kills their writer, linked, and thinned out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ssdd.engine import checkpoint
from ssdd.engine.errors import UserError

ROOT = Path(__file__).parents[2]


def weights(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((4,), value)}, "aux": {"v": torch.full((2, 2), -value), "n": torch.tensor(3)}}


def version(folder: Path) -> int:
    """Which save() a folder holds; all its parts must be of the same one."""
    tensors, state = checkpoint.load(folder)
    value = tensors["model"]["w"][0].item()
    assert (tensors["aux"]["v"] == -value).all()
    assert state["version"] == value
    return int(value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_saved_is_loaded_again_bit_for_bit(tmp_path):
    tensors = {
        "model": {
            "float": torch.randn(3, 5),
            "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "transposed": torch.randn(3, 5).t(),
            "bfloat16": torch.randn(7).bfloat16(),
            "bool": torch.tensor([True, False]),
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "nan": torch.tensor([float("nan"), float("-inf")]),
        },
        "nothing": {},
    }
    state = {"step": 7, "best": float("inf"), "lr": 0.1 + 0.2, "names": ["a"], "none": None, "nested": {"nan": 1e-320}}
    checkpoint.save(tmp_path / "c", tensors, state)
    loaded, loaded_state = checkpoint.load(tmp_path / "c")
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors["model"].items():
        assert loaded["model"][name].dtype == tensor.dtype
        assert torch.equal(loaded["model"][name].nan_to_num(), tensor.nan_to_num())
    assert loaded["nothing"] == {}


def test_tied_weights_are_written_under_both_names(tmp_path):
    shared = torch.randn(4)
    checkpoint.save_tensors(tmp_path / "t.safetensors", {"a": shared, "b": shared, "slice": shared[:2]})
    loaded = checkpoint.load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(loaded["a"], shared)
    assert torch.equal(loaded["b"], shared)
    assert torch.equal(loaded["slice"], shared[:2])


def test_equal_content_gives_equal_bytes_whatever_the_order_of_the_metadata(tmp_path):
    metadata = {f"key{i}": f'"välue" {i}\n' for i in range(8)}
    files = []
    for i in range(4):
        checkpoint.save(tmp_path / str(i), weights(1), {"step": 1}, dict(sorted(metadata.items(), reverse=i % 2 == 0)))
        files.append(contents(tmp_path / str(i)))
    assert all(file == files[0] for file in files)
    with safe_open(tmp_path / "0" / "model.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_saved_files_can_be_read_by_other_users_as_the_umask_says(tmp_path):
    checkpoint.save(tmp_path / "c", weights(1), {})
    (tmp_path / "ordinary").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "c").iterdir()}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}


def test_saving_again_replaces_the_whole_folder(tmp_path):
    checkpoint.save(tmp_path / "c", {**weights(1), "gone": {"x": torch.ones(1)}}, {"version": 1})
    checkpoint.save(tmp_path / "c", weights(2), {"version": 2})
    assert version(tmp_path / "c") == 2
    assert sorted(contents(tmp_path / "c")) == ["aux.safetensors", "model.safetensors", "state.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_missing_or_damaged_checkpoint_is_a_user_error(tmp_path):
    assert not checkpoint.exists(tmp_path / "none")
    with pytest.raises(UserError, match="none: no complete checkpoint"):
        checkpoint.load(tmp_path / "none")
    checkpoint.save(tmp_path / "c", weights(1), {"version": 1})
    os.truncate(tmp_path / "c" / "aux.safetensors", 20)
    with pytest.raises(UserError, match="aux.safetensors: not a readable safetensors file"):
        checkpoint.load(tmp_path / "c")
    (tmp_path / "c" / "state.json").write_text("{")
    with pytest.raises(UserError, match="state.json: not valid JSON"):
        checkpoint.load(tmp_path / "c")


def intermediate(tmp_path: Path, *, folder: int | None, new: int | str | None, old: int | str | None) -> Path:
    """The three folders as a killed writer leaves them: a version, "part" (without state) or none."""
    for name, content in (("c", folder), ("c.new", new), ("c.old", old)):
        if content is not None:
            value = 0 if content == "part" else content
            checkpoint.save(tmp_path / "made", weights(value), {"version": value})
            (tmp_path / "made").rename(tmp_path / name)
            if content == "part":
                (tmp_path / name / "state.json").unlink()
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({"folder": 1, "new": "part", "old": None}, 1),  # while writing
        ({"folder": 1, "new": 2, "old": None}, 1),  # written, nothing renamed
        ({"folder": 1, "new": 2, "old": "part"}, 1),  # an older leftover half deleted
        ({"folder": None, "new": 2, "old": 1}, 2),  # between the two renames
        ({"folder": 2, "new": None, "old": 1}, 2),  # renamed, the old one still there
        ({"folder": 2, "new": None, "old": "part"}, 2),  # the old one half deleted
        ({"folder": None, "new": 1, "old": None}, 1),  # the first save, before its rename
    ],
)
def test_every_state_that_a_killed_writer_leaves_can_be_read_and_written_over(tmp_path, left, expected):
    folder = intermediate(tmp_path, **left)
    assert checkpoint.exists(folder)
    assert version(folder) == expected
    checkpoint.save(folder, weights(7), {"version": 7})
    assert version(folder) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_first_save_killed_while_writing_leaves_no_checkpoint(tmp_path):
    folder = intermediate(tmp_path, folder=None, new="part", old=None)
    assert not checkpoint.exists(folder)
    checkpoint.save(folder, weights(1), {"version": 1})
    assert version(folder) == 1


KILLED_AT_CALL = """
import sys
import torch
from ssdd.engine import checkpoint
from tests.kills import AtCall, start

folder, calls = sys.argv[1], tuple(f"os:{name}" for name in ("rename", "replace", "fsync", "unlink", "rmdir"))
for fatal in range(1, 100):
    tensors = {"model": {"w": torch.full((4,), float(fatal))}, "aux": {"v": torch.full((2, 2), -float(fatal))}}
    killed, _ = start(lambda: checkpoint.save(folder, tensors, {"version": fatal}), AtCall(fatal, calls))
    tensors, state = checkpoint.load(folder)
    print(int(killed), state["version"], int(tensors["model"]["w"][0]), int(-tensors["aux"]["v"][0, 0]))
    if not killed:
        break
"""


def test_a_writer_killed_at_any_system_call_loses_at_most_its_own_version(tmp_path):
    checkpoint.save(tmp_path / "c", weights(0), {"version": 0})
    program = [sys.executable, "-c", KILLED_AT_CALL, str(tmp_path / "c")]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    previous, kills = 0, 0
    for attempt, line in enumerate(done.stdout.splitlines(), start=1):
        killed, *versions = map(int, line.split())
        assert len(set(versions)) == 1, "parts of different versions"
        assert versions[0] in (previous, attempt)
        previous = versions[0]
        kills += killed
    assert previous == attempt, "the last save was not killed"
    assert kills >= 8


def test_a_linked_checkpoint_is_another_name_of_the_same_files_and_outlives_the_first(tmp_path):
    checkpoint.save(tmp_path / "a", weights(1), {"version": 1})
    before = contents(tmp_path / "a")
    checkpoint.save(tmp_path / "b", weights(0), {"version": 0})
    checkpoint.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").samefile(tmp_path / "b" / "model.safetensors")
    checkpoint.save(tmp_path / "a", weights(2), {"version": 2})
    assert (version(tmp_path / "a"), version(tmp_path / "b")) == (2, 1)
    assert contents(tmp_path / "b") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(tmp_path / "a", weights(1), {"version": 1})
    checkpoint.link(tmp_path / "a", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_newest_steps_are_kept_by_number_and_no_other_folder_is_touched(tmp_path):
    names = ["last", "best", "step-notes", *map(checkpoint.step_name, (5, 40, 999_999, 1_000_000))]
    for name in names:
        checkpoint.save(tmp_path / name, weights(1), {"version": 1})
    checkpoint.keep_newest(tmp_path, 2)
    kept = {"last", "best", "step-notes", "step-999999", "step-1000000"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    checkpoint.keep_newest(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == kept


WRITER = """
import sys
import torch
from ssdd.engine import checkpoint

for value in range(1, 100_000):
    tensors = {"model": {"w": torch.full((4,), float(value))}, "aux": {"v": torch.full((2, 2), -float(value))}}
    checkpoint.save(sys.argv[1], tensors, {"version": value})
"""


def test_a_reader_beside_a_writer_always_sees_one_whole_version(tmp_path):
    checkpoint.save(tmp_path / "c", weights(0), {"version": 0})
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "c")], cwd=ROOT)
    try:
        seen = [0]
        while len(set(seen)) < 20:
            assert writer.poll() is None, "the writer failed"
            seen.append(version(tmp_path / "c"))
    finally:
        writer.kill()
        writer.wait()
    assert seen == sorted(seen)
