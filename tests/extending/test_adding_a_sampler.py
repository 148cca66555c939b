"""A sampler is one entry of `dit.samplers.SAMPLERS`: help, choices, task=sample and its result follow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dit.config import DiTConfig, SamplingConfig
from dit.guidance import guided_velocity
from dit.main import main
from dit.model import DiT
from dit.samplers import SAMPLERS, Sampler
from dit.tasks.sample import draw, sample_labels
from ssdd.engine.cli import parse
from ssdd.engine.random import indexed_noise
from ssdd.model.flow import step_lengths
from tests.golden import fill_state_dict


def jitter(velocity, x: Tensor, grid: list[float], callback=None, *, noise: Iterator[Tensor], size: float) -> Tensor:
    """Euler's method that adds noise to every step."""
    for i, dt in enumerate(step_lengths(grid)):
        x = x + velocity(x, x.new_full((), grid[i])) * dt + size * next(noise)
    return x


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Sampler(jitter, evaluations=lambda steps: steps, options={"size": "sde_scale"}, noise=True)
    monkeypatch.setitem(SAMPLERS, "jitter", entry)


@pytest.fixture
def model() -> DiT:
    model = DiT.from_name("DiT-XXS/1", input_size=2, in_channels=2, num_classes=3, learn_sigma=False)
    model.load_state_dict(fill_state_dict(model.state_dict(), keep=("pos_embed",)))
    return model.eval()


def test_it_is_in_the_help_and_a_choice_of_the_config(added, capsys):
    with pytest.raises(SystemExit):
        parse(DiTConfig, ["--help"], program="dit", description="")
    assert "euler | heun | adaptive | sde | jitter" in " ".join(capsys.readouterr().out.split())
    cfg = parse(DiTConfig, ["sampling.sampler=jitter"], program="dit", description="")
    assert cfg.sampling.sampler == "jitter"


def test_task_sample_draws_with_it_and_its_result_names_it(added, model, tmp_path: Path):
    weights = model.save_pretrained(tmp_path / "weights")
    arguments = ["task=sample", f"sampling.checkpoint={weights}", f"out={tmp_path / 'set'}", "sampling.n=3"]
    arguments += ["sampling.steps=2", "sampling.sampler=jitter", "sampling.sde_scale=0.5", "sampling.cfg_scale=1"]
    assert main([*arguments, "sampling.mixed_precision=no"]) == 0
    assert json.loads((tmp_path / "set" / "sample_set.json").read_text())["sampler"] == "jitter"
    streams = ("sample", "jitter.0", "jitter.1")
    start, *noise = (indexed_noise(range(3), (2, 2, 2), 0, f"dit.{stream}") for stream in streams)
    with torch.no_grad():
        velocity = guided_velocity(model, sample_labels(range(3), 3, 0))
        expected = jitter(velocity, start, [1.0, 0.5, 0.0], noise=iter(noise), size=0.5)
    torch.testing.assert_close(load_file(tmp_path / "set" / "latents.safetensors")["z_n"], expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_entry_tells_how_often_its_solver_evaluates_the_network(model, name):
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    cfg = SamplingConfig(sampler=name, steps=4, cfg_scale=1.0, rtol=0.5, atol=0.5)
    draw(model, range(2), sample_labels(range(2), 3, 0), cfg)
    hook.remove()
    evaluations = SAMPLERS[name].evaluations
    assert len(calls) == evaluations(4) if evaluations else len(calls) > 1
