"""Progress output and metric files of a loop."""

from __future__ import annotations

import io
import re

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_metrics_go_to_the_run_and_to_tensorboard_and_a_resumed_run_replaces_what_it_does_again(tmp_path):
    run = RunDirectory(tmp_path, "r")
    with ProgressLog(4, run=run, stream=io.StringIO()) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"loss": float(step)}, show=False)
        log.picture(3, "samples", np.zeros((4, 6, 3), np.uint8))
    assert [path.name for path in run.pictures.iterdir()] == ["samples-000003.png"]
    assert run.read_metrics() == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    run.truncate_metrics(2)
    with ProgressLog(4, run=run, start=2, stream=io.StringIO()) as log:
        log.metrics(3, {"loss": 30.0}, show=False)
    assert [row["loss"] for row in run.read_metrics()] == [1.0, 2.0, 30.0]
    assert scalars(run) == {1: 1.0, 2: 2.0, 3: 30.0}


def test_hidden_metrics_print_nothing_and_a_resumed_loop_counts_from_its_start():
    out = io.StringIO()
    log = ProgressLog(10, start=5, stream=out)
    log.metrics(5, {"loss": 1.0}, show=False)
    assert out.getvalue() == ""
    assert log.position() == "5/10 (50 %)"
    log.advance()
    assert log.position().startswith("6/10 (60 %), ")


def test_durations_read_as_clock_times():
    assert format_seconds(5) == "0:05"
    assert format_seconds(200) == "3:20"
    assert format_seconds(3661) == "1:01:01"
