"""Run directories."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest

from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json
from ssdd.engine.run import RunDirectory


@dataclass
class Config:
    seed: int = 3


def test_nothing_is_created_before_something_is_written(tmp_path):
    run = RunDirectory(tmp_path / "runs", "first")
    assert run.path == tmp_path / "runs" / "jobs" / "first"
    assert run.checkpoints == run.path / "checkpoints"
    assert run.pictures == run.path / "pictures"
    assert list(tmp_path.iterdir()) == []


def test_config_metrics_and_result_are_files_of_the_run(tmp_path):
    run = RunDirectory(tmp_path, "r")
    run.save_config(Config())
    run.append_metrics({"step": 1, "loss": 0.5})
    run.append_metrics({"step": 2, "loss": float("nan")})
    run.write_result({"psnr": 30.0})
    assert (run.path / "config.yaml").read_text() == "seed: 3\n"
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n'
    assert read_json(run.path / "task_result.json") == {"psnr": 30.0}


def test_truncating_drops_the_steps_that_a_resumed_run_does_again(tmp_path):
    run = RunDirectory(tmp_path, "r")
    run.truncate_metrics(0)
    for step in range(5):
        run.append_metrics({"step": step, "loss": step / 10})
    whole = run.metrics.read_bytes()
    run.truncate_metrics(2)
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2]
    for step in range(3, 5):
        run.append_metrics({"step": step, "loss": step / 10})
    assert run.metrics.read_bytes() == whole


def test_half_a_line_of_a_killed_process_harms_neither_reading_nor_appending(tmp_path):
    run = RunDirectory(tmp_path, "r")
    run.append_metrics({"step": 1})
    with open(run.metrics, "a") as file:
        file.write('{"step": 2, "lo')
    assert run.read_metrics() == [{"step": 1}]
    run.append_metrics({"step": 3})
    assert run.read_metrics() == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("name", ["", " ", ".", "..", ".hidden", "a/b", "a\\b", "run@last"])
def test_a_name_that_cannot_be_a_folder_or_a_reference_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="run_name"):
        RunDirectory(tmp_path, name)


def test_a_run_is_claimed_by_one_program_at_a_time(tmp_path, caplog):
    entered, leave, order = threading.Event(), threading.Event(), []

    def train(name: str) -> None:
        with RunDirectory(tmp_path, "run").claimed(is_main=True):
            order.append(name)
            entered.set()
            leave.wait(60)
            order.append(name)

    first, second = (threading.Thread(target=train, args=[name]) for name in ("first", "second"))
    first.start()
    assert entered.wait(60)
    second.start()
    deadline = time.monotonic() + 60
    while "another training holds the lock" not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)
    with RunDirectory(tmp_path, "run").claimed(is_main=False), RunDirectory(tmp_path, "other").claimed(is_main=True):
        assert order == ["first"]  # other ranks and other runs don't wait
    leave.set()
    first.join(60)
    second.join(60)
    assert order == ["first", "first", "second", "second"]
