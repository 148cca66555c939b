"""Running means: each name over the steps that had it, over parts and processes, and on after a checkpoint."""

from __future__ import annotations

import pytest
import torch

from ssdd.engine.processes import Processes
from ssdd.engine.running_means import RunningMeans

ALONE = Processes(0, 1, torch.device("cpu"))


def made(*names: str) -> RunningMeans:
    return RunningMeans(names, torch.device("cpu"))


def test_a_name_is_averaged_over_the_steps_that_had_it():
    means = made("loss", "late", "never")
    for step in range(4):
        values = {"loss": torch.tensor(float(step), requires_grad=True)}
        values |= {"late": torch.tensor(10.0)} if step == 3 else {}
        means.add(values)
        means.count(values)
    assert means.read(ALONE) == {"loss": 1.5, "late": 10.0}
    assert means.read(ALONE) == {}


def test_parts_of_a_step_share_its_weight():
    means = made("loss")
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value)}, 1 / 3)
    means.count(["loss"])
    assert means.read(ALONE) == {"loss": pytest.approx(3.0)}


def test_sums_go_on_in_their_process_or_are_averaged_for_another_number_of_them():
    saved, steps = torch.tensor([[1.0, 4.0], [3.0, 8.0]]), {"a": 2, "b": 4}
    second = made("a", "b")
    second.load(saved, steps, Processes(1, 2, torch.device("cpu")))
    assert second.sums.tolist() == [3.0, 8.0]
    alone = made("a", "b")
    alone.load(saved, steps, ALONE)
    assert alone.read(ALONE) == {"a": 1.0, "b": 1.5}
