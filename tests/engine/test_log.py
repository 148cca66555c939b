"""Progress output and metric files of a loop."""

from __future__ import annotations

import io
import re
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from ssdd.engine.errors import UserError
from ssdd.engine.log import ProgressLog, format_seconds
from ssdd.engine.run import RunDirectory


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_report_is_one_line_with_the_time_left():
    out = io.StringIO()
    with ProgressLog(200, description="train", stream=out) as log:
        log.message("started")
        log.advance(50)
        log.metrics(50, {"loss": torch.tensor(0.123456), "note": "x", "lr": 1e-4})
    first, second = out.getvalue().splitlines()
    assert first == "started"
    assert re.fullmatch(r"train 50/200 \(25 %\), \d+:\d\d left  loss 0\.1235  lr 0\.0001", second)


def test_on_a_terminal_there_is_a_bar():
    out = Terminal()
    with ProgressLog(4, description="encode", stream=out) as log:
        log.advance(4)
        log.metrics(4, {"loss": 1.0})
        log.message("done")
    assert "encode: 100%" in out.getvalue()
    assert "4/4" in out.getvalue()
    assert "loss 1" in out.getvalue()
    assert "done\n" in out.getvalue()


def test_other_processes_are_silent_and_write_nothing(tmp_path):
    out = Terminal()
    run = RunDirectory(tmp_path, "r")
    with ProgressLog(4, run=run, main_process=False, stream=out) as log:
        log.advance()
        log.metrics(1, {"loss": 1.0})
        log.message("hello")
        log.picture(1, "p", np.zeros((4, 4, 3), np.uint8))
    assert out.getvalue() == ""
    assert list(tmp_path.iterdir()) == []
    assert log.done == 1


def scalars(run: RunDirectory) -> dict[int, float]:
    events = EventAccumulator(str(run.tensorboard)).Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def test_metrics_go_to_the_run_and_to_tensorboard_and_a_resumed_run_replaces_what_it_does_again(tmp_path, monkeypatch):
    # Files of one second and process are read in the order of their numbers as text, in which 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    run = RunDirectory(tmp_path, "r")
    with ProgressLog(4, run=run, stream=io.StringIO()) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"loss": float(step)})
        log.picture(3, "samples", np.zeros((4, 6, 3), np.uint8))
    assert [path.name for path in run.pictures.iterdir()] == ["samples-000003.png"]
    assert run.read_metrics() == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    run.truncate_metrics(2)
    with ProgressLog(4, run=run, start=2, stream=io.StringIO()) as log:
        log.metrics(3, {"loss": 30.0})
    assert [row["loss"] for row in run.read_metrics()] == [1.0, 2.0, 30.0]
    assert scalars(run) == {1: 1.0, 2: 2.0, 3: 30.0}


def test_a_resumed_loop_counts_from_its_start():
    log = ProgressLog(10, start=5, stream=io.StringIO())
    assert log.position() == "5/10 (50 %)"
    log.advance()
    assert log.position().startswith("6/10 (60 %), ")


def test_durations_read_as_clock_times():
    assert format_seconds(5) == "0:05"
    assert format_seconds(200) == "3:20"
    assert format_seconds(3661) == "1:01:01"


class FakeWandb:
    """Stands for the module: notes how runs were opened, logged to and finished."""

    def __init__(self) -> None:
        self.opened, self.logged, self.finished = [], [], 0

    def init(self, **options: object) -> FakeWandb:
        self.opened.append(options)
        return self

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    def Image(self, image: np.ndarray) -> tuple:  # noqa: N802
        return image.shape


def test_metrics_and_pictures_go_to_wandb_and_a_continued_run_to_the_same_one(tmp_path, monkeypatch):
    service, run = FakeWandb(), RunDirectory(tmp_path, "r")
    monkeypatch.setitem(sys.modules, "wandb", service)
    for start in (0, 1):
        with ProgressLog(2, run=run, start=start, wandb="digits", stream=io.StringIO()) as log:
            log.metrics(start + 1, {"loss": 2.0, "note": "text"})
            log.picture(start + 1, "samples", np.zeros((4, 6, 3), np.uint8))
    first, second = service.opened
    assert first == second and first["project"] == "digits" and first["name"] == "r" and first["resume"] == "allow"
    assert service.finished == 2
    assert service.logged == [(s, v) for s in (1, 2) for v in ({"loss": 2.0}, {"samples": (4, 6, 3)})]
    other = RunDirectory(tmp_path, "other")
    ProgressLog(2, run=other, wandb="digits", stream=io.StringIO()).close()
    assert service.opened[-1]["id"] != first["id"]
    ProgressLog(2, run=other, wandb="digits", main_process=False, stream=io.StringIO()).close()
    assert len(service.opened) == 3


def test_without_the_wandb_package_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        ProgressLog(2, run=RunDirectory(tmp_path, "r"), wandb="digits", stream=io.StringIO())
