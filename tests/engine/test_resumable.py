"""Work for a request is kept for the same request only, and chunks that are done stay."""

from __future__ import annotations

import shutil

import pytest
import torch

from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json
from ssdd.engine.resumable import Chunks, WorkRecord


def test_a_record_is_read_for_its_own_request_only(tmp_path):
    record = WorkRecord(tmp_path / "done.json", {"steps": (1, 2), "of": None})
    assert record.found() is None and record.read() is None
    record.write(seconds=3)
    assert record.read() == record.found() == {"steps": [1, 2], "of": None, "seconds": 3}
    other = WorkRecord(tmp_path / "done.json", {"steps": (1, 3), "of": None})
    assert other.read() is None and other.found() == record.found()


def test_work_that_is_begun_again_is_kept_and_other_work_is_deleted(tmp_path):
    record = WorkRecord(tmp_path / "record.json", {"request": 1})
    work = tmp_path / "work" / "file"
    assert record.begin(tmp_path / "work") == {"request": 1}  # nothing is there to delete
    work.parent.mkdir()
    work.touch()
    record.write(seconds=2)
    assert record.begin(work.parent)["seconds"] == 2 and work.exists()
    assert WorkRecord(record.path, {"request": 2}).begin(work.parent) == {"request": 2} == read_json(record.path)
    assert not work.parent.exists()


def test_work_whose_deletion_was_interrupted_is_deleted_whoever_asks_next(tmp_path, monkeypatch):
    old, new = (WorkRecord(tmp_path / "record.json", {"request": number}) for number in (1, 2))
    old.begin()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "half").touch()

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        new.begin(tmp_path / "work")
    assert old.begin(tmp_path / "work") == {"request": 1} and not (tmp_path / "work").exists()


def test_a_damaged_record_is_an_error_and_nothing_is_deleted(tmp_path):
    record = WorkRecord(tmp_path / "work" / "record.json", {"request": 1})
    record.begin(tmp_path / "work")
    record.path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        record.begin(tmp_path / "work")
    assert record.path.exists()


def test_every_chunk_is_made_once_by_one_process(tmp_path):
    def chunks(**request) -> Chunks:
        return Chunks(tmp_path / "chunks", request, count=10, size=4)

    first = chunks(seed=0)
    first.prepare()
    assert list(first.missing()) == first.ranges == [range(0, 4), range(4, 8), range(8, 10)]
    assert [*first.missing(0, 2), *first.missing(1, 2)] == [range(0, 4), range(8, 10), range(4, 8)]
    first.save(range(4, 8), {"x": torch.arange(4)}, seconds=2.0)
    (tmp_path / "chunks" / ".000000000.safetensors.0a1b2c3d.tmp").touch()
    again = chunks(seed=0)
    again.prepare()
    assert list(again.missing()) == [range(0, 4), range(8, 10)]
    assert again.load(range(4, 8))["x"].tolist() == [0, 1, 2, 3] and not list(tmp_path.rglob("*.tmp"))
    for indices in again.missing():
        again.save(indices, {"x": torch.tensor(indices)}, seconds=1.0)
    assert again.samples_per_s() == 2.0  # of 4, 2 and 2 samples per second
    other = chunks(seed=1)
    other.prepare()
    assert list(other.missing()) == other.ranges
    other.remove()
    assert not (tmp_path / "chunks").exists()
