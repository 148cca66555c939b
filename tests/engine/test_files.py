"""Atomic files, JSON and fingerprints."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ssdd.engine.errors import UserError
from ssdd.engine.files import (
    plain,
    read_json,
    remove_leftovers,
    replacing,
    sha256_file,
    sha256_json,
    write_atomic,
    write_json,
)
from tests.kills import AtCall, start


def test_a_written_file_holds_the_new_content_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    write_atomic(path, "first")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_write_keeps_the_old_content_and_its_leftover_can_be_removed(tmp_path):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    killed, _ = start(lambda: write_atomic(path, "new"), AtCall(1, ("os:replace",)))
    assert killed
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_permissions_of_ordinary_files(tmp_path):
    write_atomic(tmp_path / "atomic", "x")
    (tmp_path / "ordinary").write_text("x")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


@dataclass
class Point:
    x: float
    where: Path


def test_json_takes_dataclasses_paths_arrays_and_scalars(tmp_path):
    value = {
        "point": Point(1.5, Path("a/b")),
        "array": np.arange(3, dtype=np.float32),
        "scalar": np.float64(0.1),
        "count": np.int64(7),
        "tensor": torch.ones(2, 1),
        3: (True, None, "ü"),
    }
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == {
        "point": {"x": 1.5, "where": "a/b"},
        "array": [0.0, 1.0, 2.0],
        "scalar": 0.1,
        "count": 7,
        "tensor": [[1.0], [1.0]],
        "3": [True, None, "ü"],
    }


def test_json_is_standard_nan_and_infinity_become_null(tmp_path):
    write_json(tmp_path / "v.json", {"nan": float("nan"), "inf": np.float32("inf"), "one": 1.0})

    def reject(constant):
        raise AssertionError(constant)

    assert json.loads((tmp_path / "v.json").read_text(), parse_constant=reject) == {"nan": None, "inf": None, "one": 1}


def test_what_json_cannot_hold_is_an_error():
    with pytest.raises(TypeError, match="set"):
        plain({"a": {1, 2}})


def test_a_missing_or_broken_json_file_is_a_user_error_with_its_path(tmp_path):
    with pytest.raises(UserError, match="none.json: no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(UserError, match="half.json: not valid JSON"):
        read_json(tmp_path / "half.json")


def test_fingerprints_depend_on_content_alone(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"a": 1, "b": (1, 2)}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.5})
    assert sha256_json({"a": 0.1}) == sha256_json({"a": np.float64(0.1)})


def test_a_block_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(ValueError, match="inside"), replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError("inside")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
