"""A sample depends on its index, the weights and the settings alone, and a set survives interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dit.sample
from dit.config import DiTConfig, SamplingConfig
from dit.guidance import guided_velocity
from dit.main import main
from dit.model import DiT
from dit.sample import draw, run, sample_labels
from dit.train import run as train
from ssdd.engine.errors import UserError
from ssdd.engine.noise import indexed_noise
from ssdd.latent import LatentNorm
from tests.golden import fill_state_dict

SAMPLING = SamplingConfig(n=10, steps=3, batch_size=4, cfg_scale=2.0)


@pytest.fixture
def model() -> DiT:
    model = DiT.from_name("DiT-XXS/1", input_size=(2, 4), in_channels=2, num_classes=3, learn_sigma=False)
    model.load_state_dict(fill_state_dict(model.state_dict(), keep=("pos_embed",)))
    return model.eval()


@pytest.fixture
def config(model: DiT, tmp_path: Path) -> Callable[..., DiTConfig]:
    file = model.save_pretrained(tmp_path / "weights")

    def make(out: str = "samples", **sampling: object) -> DiTConfig:
        cfg = replace(SAMPLING, checkpoint=str(file), **sampling)
        return DiTConfig(task="sample", ckpt_dir=str(tmp_path), out=str(tmp_path / out), sampling=cfg)

    return make


def latents(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "latents.safetensors")


def test_a_sample_does_not_depend_on_its_batch(model):
    labels = sample_labels(range(10), 3, seed=0)
    together = draw(model, range(10), labels, SAMPLING)
    alone = torch.cat([draw(model, [i], labels[i : i + 1], SAMPLING) for i in range(10)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[3])  # same class, other index


def test_one_euler_step_is_the_noise_plus_its_velocity(model):
    labels = sample_labels(range(4), 3, seed=0)
    noise = indexed_noise(range(4), (2, 2, 4), SAMPLING.seed, stream="dit.sample")
    with torch.no_grad():
        expected = noise + guided_velocity(model, labels, 2.0)(noise, torch.tensor(1.0))
    torch.testing.assert_close(draw(model, range(4), labels, replace(SAMPLING, steps=1)), expected)


def test_balanced_labels_cycle_and_random_ones_depend_on_the_index_alone():
    assert sample_labels(range(7), 3, seed=0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    labels = sample_labels(range(300), 10, seed=0, balanced=False)
    assert labels[100:].tolist() == sample_labels(range(100, 300), 10, seed=0, balanced=False).tolist()
    assert set(labels.tolist()) == set(range(10)) and labels.tolist() != sample_labels(range(300), 10, 0).tolist()


def test_a_smaller_set_is_the_beginning_of_a_larger_one(config):
    small, large = latents(run(config("small", n=5))), latents(run(config("large", n=10)))
    assert small["z_n"].shape == (5, 2, 2, 4) and small["z_n"].dtype == torch.float32
    assert torch.equal(small["z_n"], large["z_n"][:5]) and torch.equal(small["labels"], large["labels"][:5])


def test_an_interrupted_set_continues_to_the_same_bytes_and_a_finished_one_is_kept(config, monkeypatch):
    straight = run(config("straight"))
    calls = []

    def interrupted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(dit.sample, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config("again"))
    again = run(config("again"))
    assert len(calls) == 4  # chunks 1, 2, the failed third, and the third again
    for name in ("latents.safetensors", "sample_set.json"):
        assert (again / name).read_bytes() == (straight / name).read_bytes()
    assert not (again / "chunks").exists()
    run(config("again"))
    assert len(calls) == 4
    run(config("again", cfg_scale=3.0))
    assert len(calls) == 7
    assert not torch.equal(latents(again)["z_n"], latents(straight)["z_n"])


def test_chunks_of_other_settings_are_not_mixed_in(config, monkeypatch):
    calls = []

    def interrupted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dit.sample, "draw", interrupted)
        run(config("again", seed=1))
    assert torch.equal(latents(run(config("again")))["z_n"], latents(run(config("straight")))["z_n"])


def test_samples_of_a_trained_run_carry_what_decoding_needs(settings, caches, tmp_path):
    cfg = settings(steps=2)
    train(cfg)
    arguments = ["task=sample", "run_name=run", f"ckpt_dir={tmp_path}", "sampling.n=6", "sampling.steps=2"]
    assert main(arguments) == 0
    folder = tmp_path / "jobs" / "run" / "samples"
    described = json.loads((folder / "sample_set.json").read_text())
    assert (described["n"], described["num_classes"], described["latent_shape"]) == (6, 10, [2, 4, 4])
    assert described["checkpoint"] == "run" and described["class_names"] == [str(i) for i in range(10)]
    assert latents(folder)["labels"].tolist() == [0, 1, 2, 3, 4, 5]
    norm, original = LatentNorm.load(folder / "z_stats.json"), LatentNorm.load(caches["mean"] / "z_stats.json")
    assert torch.equal(norm.mean, original.mean) and norm.fingerprint == original.fingerprint


def test_impossible_requests_are_user_errors(config, capsys, tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        run(config(n=0))
    assert main(["task=sample", "run_name=nobody", f"ckpt_dir={tmp_path}"]) == 2
    assert "error: no weights for 'nobody'" in capsys.readouterr().err
