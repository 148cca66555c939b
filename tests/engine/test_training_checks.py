"""What surrounds a training loop: dividing the batch, refusing a changed run, stopping at a non-finite loss."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ssdd.engine.devices import choose_kernels, peak_memory
from ssdd.engine.errors import UserError
from ssdd.engine.processes import Processes
from ssdd.engine.training_checks import FirstBadStep, check_identity, check_training, rows_a_process
from ssdd.engine.training_keys import TrainingKeys

LAST = Path("runs/jobs/a/checkpoints/last")


class WithOthers(Processes):
    """Processes of which the others hold a bad step each."""

    def __init__(self, *others: int):
        super().__init__(0, 1 + len(others), torch.device("cpu"))
        object.__setattr__(self, "others", torch.tensor(others, dtype=torch.int64))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, self.others])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_every": 0}, "training.save_every=0 must be at least 1"),
        ({"grad_clip": -0.5}, "training.grad_clip=-0.5 must not be negative; 0 disables"),
        ({"fsdp": True, "compile": True}, "set training.compile=false"),
    ],
)
def test_keys_that_no_training_can_work_with_are_refused(changes, message):
    check_training(TrainingKeys(grad_clip=0.0, fsdp=True), {"steps": 1})
    with pytest.raises(UserError, match=message):
        check_training(TrainingKeys(**changes), {"steps": 1})
    with pytest.raises(UserError, match="training.epochs=0 must be at least 1"):
        check_training(TrainingKeys(), {"epochs": 0})


@pytest.mark.parametrize(
    ("batch_size", "world", "parts", "rows"), [(8, 1, 1, 8), (8, 2, 1, 4), (8, 2, 4, 4), (256, 8, 2, 32), (1, 1, 1, 1)]
)
def test_the_batch_is_divided_evenly_over_processes_whatever_the_parts(batch_size, world, parts, rows):
    assert rows_a_process("training.batch_size", batch_size, world, parts) == rows


@pytest.mark.parametrize(
    ("batch_size", "world", "parts", "multiple"),
    [(8, 3, 1, 3), (8, 2, 3, 6), (0, 2, 1, 2), (-4, 2, 2, 4), (8, 2, 0, 2)],
)
def test_a_batch_that_does_not_divide_is_refused_with_what_would(batch_size, world, parts, multiple):
    with pytest.raises(UserError, match=rf"dataset.batch_size={batch_size} does not.*multiple of {multiple}$"):
        rows_a_process("dataset.batch_size", batch_size, world, parts)


def test_an_unchanged_run_continues_also_when_its_checkpoint_says_more():
    check_identity({"seed": 0, "model": {"width": 8}, "written": "later"}, {"seed": 0, "model": {"width": 8}}, LAST)


def test_a_changed_run_is_refused_with_every_change_the_folder_and_the_remedy():
    with pytest.raises(UserError) as error:
        check_identity({"seed": 0, "lr": 1e-3}, {"seed": 1, "lr": 1e-3, "data": "abc"}, LAST)
    message = str(error.value)
    assert "seed was 0, is 1; data was None, is abc" in message and "lr was" not in message
    assert str(LAST) in message and "another run_name" in message


def test_finite_steps_pass_and_the_first_bad_step_of_any_process_stops_all():
    fine = FirstBadStep(torch.device("cpu"))
    for done in (1, 2):
        fine.add(torch.tensor(2.0), None)
        fine.end(done)
    fine.check(WithOthers(-1, -1), LAST)
    with pytest.raises(UserError, match="not finite at step 3; training stopped before the first checkpoint"):
        fine.check(WithOthers(-1, 3, 9), LAST)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_step_is_remembered_through_the_good_ones_after_it(value):
    bad = FirstBadStep(torch.device("cpu"))
    for done, values in enumerate(([1.0, 1.0], [1.0, value], [1.0, 1.0], [value, value]), 1):
        bad.add(*map(torch.tensor, values))
        bad.end(done)
    with pytest.raises(UserError, match="not finite at step 2;"):
        bad.check(WithOthers(-1, 4), LAST)


def test_kernels_are_chosen_anew_by_every_task(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    choose_kernels(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    choose_kernels(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_peak_memory_on_a_cpu_is_that_of_the_process_in_bytes_and_never_falls():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(4 * 2**20)  # 16 MiB
    assert peak_memory(torch.device("cpu")) >= before > held.nbytes
