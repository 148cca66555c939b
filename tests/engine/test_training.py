"""What surrounds a training loop: dividing the batch, refusing a changed run, stopping at a non-finite loss."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from ssdd.engine.errors import UserError
from ssdd.engine.precision import mixed_precision
from ssdd.engine.training import check_finite, check_identity, open_accelerator, peak_memory, rows_a_process

LAST = Path("runs/jobs/a/checkpoints/last")


@pytest.fixture
def fresh_state(monkeypatch):
    """Neither accelerate's process-wide state nor torch's determinism leaks into or out of a test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # recorded, so that what the test sets is taken back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    deterministic = torch.are_deterministic_algorithms_enabled()
    reset()
    yield
    reset()
    torch.use_deterministic_algorithms(deterministic)


class Processes:
    """Stands for accelerate where the other processes hold `others`."""

    def __init__(self, *others: int):
        self.others = torch.tensor(others, dtype=torch.int64)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        return torch.cat([own, self.others])


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
    check_finite(Processes(-1, -1), torch.tensor(-1), LAST)
    with pytest.raises(UserError, match="not finite at step 3; training stopped before the first checkpoint"):
        check_finite(Processes(-1, 3, 9), torch.tensor(-1), LAST)
    with pytest.raises(UserError, match="not finite at step 0;"):
        check_finite(Processes(-1), torch.tensor(0), LAST)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_accelerator_opens_on_the_best_device_and_may_be_deterministic(fresh_state, deterministic):
    torch.use_deterministic_algorithms(False)
    accelerator = open_accelerator("no", deterministic)
    assert isinstance(accelerator, Accelerator) and accelerator.mixed_precision == "no"
    best = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    assert accelerator.device.type == best
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    check_finite(accelerator, torch.tensor(-1, device=accelerator.device), LAST)
    with pytest.raises(UserError, match="step 4"):
        check_finite(accelerator, torch.tensor(4, device=accelerator.device), LAST)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_parameters_are_refused_not_trained_wrongly(fresh_state, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"configured for {name}"):
        open_accelerator("no", False)


def test_precisions_go_through_and_half_precision_on_a_cpu_is_refused():
    assert [mixed_precision(name, "cpu") for name in ("no", "bf16")] == ["no", "bf16"]
    assert mixed_precision("auto", "cpu") in ("no", "bf16")
    with pytest.raises(UserError, match="needs a GPU"):
        mixed_precision("fp16", "cpu")


def test_peak_memory_on_a_cpu_is_that_of_the_process_in_bytes_and_never_falls():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(4 * 2**20)  # 16 MiB
    assert peak_memory(torch.device("cpu")) >= before > held.nbytes
