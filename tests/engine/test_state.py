"""A run's state: parts come back from their files, another identity is refused, and the log says what changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ssdd.engine.ema import Ema
from ssdd.engine.errors import UserError
from ssdd.engine.optim import GradientStep
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.run import RunDirectory
from ssdd.engine.running_means import RunningMeans
from ssdd.engine.state import Auxiliary, Average, OptimizerState, TrainingState, Weights

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


class Run:
    """A linear layer that learns to be zero, with everything that a training page keeps."""

    def __init__(self, folder: Path, precision: str = "no", **identity: object):
        self.network, self.head = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
        parameters = dict(self.network.named_parameters())
        optimizer = torch.optim.AdamW([*parameters.values(), self.head], lr=0.1)
        self.update = GradientStep(
            optimizer, [*parameters.values(), self.head], 1.0, torch.amp.GradScaler("cpu", enabled=False)
        )
        self.ema, self.means = Ema(parameters, 0.5), RunningMeans(["loss"], CPU)
        parts = {
            "model": Weights(self.network),
            "model_ema": Average(self.ema, self.network),
            "optimizer": OptimizerState(optimizer),
            "aux": Auxiliary({"head": self.head}, self.means, self.update.scaler, ALONE),
        }
        directory, precision = RunDirectory(folder, "run"), Precision.resolve(precision, CPU)
        self.state = TrainingState(directory, ALONE, identity, parts, {"made": "here"}, precision, keep=1)

    def step(self) -> None:
        x = torch.linspace(-1, 1, 3) + self.state.step
        loss = (self.network(x) * self.head).square().sum()
        self.update.backward(loss)
        self.means.add({"loss": loss})
        self.means.count(["loss"])
        self.update.apply(0.1)
        self.ema.update(dict(self.network.named_parameters()))
        self.state.step += 1

    def everything(self) -> list[torch.Tensor]:
        return [tensor.clone() for part in self.state.parts.values() for tensor in part.tensors().values()]


def test_a_restored_run_goes_on_as_if_it_had_never_ended(tmp_path):
    run = Run(tmp_path, seed=0)
    for _ in range(3):
        run.step()
    run.state.best, run.state.metrics = {"metric": "PSNR", "value": 3.0}, {"loss": 2.5}
    run.state.save("step-000003", "last")
    again = Run(tmp_path, seed=0)
    again.state.restore(steps=10)
    assert (again.state.step, again.state.best, again.state.metrics) == (3, run.state.best, run.state.metrics)
    assert again.state.seconds >= run.state.seconds - 5
    for _ in range(2):
        run.step()
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(run.everything(), again.everything(), strict=True))
    assert again.means.steps == {"loss": 5}


def test_only_the_newest_numbered_checkpoints_are_kept_and_last_stays(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2):
        run.step()
        run.state.save(f"step-{step:06d}", "last")
    assert sorted(path.name for path in run.state.directory.checkpoints.iterdir()) == ["last", "step-000002"]


def test_another_identity_and_fewer_steps_are_refused(tmp_path):
    run = Run(tmp_path, seed=0)
    run.step()
    run.state.save("last")
    with pytest.raises(UserError, match="seed was 0, is 1"):
        Run(tmp_path, seed=1).state.restore(steps=5)
    with pytest.raises(UserError, match="is at step 1, beyond training.steps=0"):
        Run(tmp_path, seed=0).state.restore(steps=0)


def test_a_run_that_goes_on_in_another_precision_says_so_in_its_first_line_and_result(tmp_path):
    for precision, line, earlier in (
        ("bf16", "precision bf16", None),
        ("bf16", "precision bf16", None),
        ("no", "precision no; bf16 until step 2", ["bf16"]),
        ("no", "precision no", ["bf16"]),
        ("bf16", "precision bf16; no until step 4", ["bf16", "no"]),
    ):
        run = Run(tmp_path, precision)
        run.state.restore(steps=5)
        assert run.state.headline() == line
        run.step()
        run.state.save("last")
        recorded = run.state.result(1, 1, [])["precision"]
        assert (recorded["mixed_precision"], recorded.get("earlier")) == (precision, earlier)


def test_a_prolonged_run_keeps_the_start_of_its_average(tmp_path):
    run = Run(tmp_path)
    for _ in range(3):
        run.step()
    run.state.save("last")
    prolonged = Run(tmp_path)
    prolonged.ema.start_iter = 50  # of a longer plan
    prolonged.state.restore(steps=500)
    run.step()
    prolonged.step()
    averages = zip(run.ema.tensors().values(), prolonged.ema.tensors().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in averages)


def test_gradients_are_clipped_together():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    update = GradientStep(torch.optim.SGD([a, b], lr=9.0), [a, b], 1.0, torch.amp.GradScaler("cpu", enabled=False))
    update.backward(3 * a.sum() + 4 * b.sum())
    assert update.apply(lr=1.0).item() == pytest.approx(5.0)
    assert [a.item(), b.item()] == pytest.approx([-0.6, -0.8], rel=1e-5)
