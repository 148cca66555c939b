"""A sample depends on its index, the weights and the settings alone, and a set survives interruptions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dit.tasks.sample
from dit.config import DiTConfig, SamplingConfig
from dit.guidance import guided_velocity
from dit.main import main
from dit.model import DiT
from dit.samplers import sde, sde_grid
from dit.tasks.sample import draw, load_guide, run, sample_labels
from dit.tasks.train import run as train
from ssdd.engine.checkpoint import save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file
from ssdd.engine.random import indexed_noise
from ssdd.model.latent import LatentNorm
from tests.golden import fill_state_dict

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = SamplingConfig(n=10, steps=3, batch_size=4, cfg_scale=2.0, mixed_precision="no")


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


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde", "adaptive"])
def test_a_sample_does_not_depend_on_its_batch(model, sampler):
    cfg = replace(SAMPLING, sampler=sampler, steps=4, cfg_interval=(0.2, 0.7), rtol=0.05, atol=0.05)
    labels = sample_labels(range(10), 3, seed=0)
    together = draw(model, range(10), labels, cfg)
    alone = torch.cat([draw(model, [i], labels[i : i + 1], cfg) for i in range(10)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[3])  # same class, other index


def test_the_noise_of_the_sde_is_that_of_seed_step_and_index(model):
    labels = sample_labels(range(3), 3, seed=0)
    noise = (indexed_noise(range(3), (2, 2, 4), SAMPLING.seed, f"dit.sde.{i}") for i in range(2))
    start = indexed_noise(range(3), (2, 2, 4), SAMPLING.seed, stream="dit.sample")
    with torch.no_grad():
        expected = sde(guided_velocity(model, labels, 2.0), start, sde_grid(3), noise=noise)
    # Where the interval cuts the grid, the steps go on counting.
    assert torch.equal(draw(model, range(3), labels, replace(SAMPLING, sampler="sde")), expected)
    cut = replace(SAMPLING, sampler="sde", cfg_scale=1.0, cfg_interval=(0.1, 0.9))
    assert torch.equal(
        draw(model, range(3), labels, cut), draw(model, range(3), labels, replace(cut, cfg_interval=(0, 1)))
    )


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_two_processes_draw_the_bytes_of_one(config, sampler, tmp_path):
    alone = run(config("one", sampler=sampler, cfg_interval=(0.2, 0.7)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    keys = ["task=sample", f"out={tmp_path / 'two'}", f"sampling.sampler={sampler}", "sampling.cfg_interval=[0.2,0.7]"]
    keys += [f"sampling.{key}={getattr(SAMPLING, key)}" for key in ("n", "steps", "batch_size", "cfg_scale")]
    keys.append(f"sampling.checkpoint={tmp_path / 'weights' / 'model.safetensors'}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(ROOT / "dit" / "main.py"), *keys]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    name = "latents.safetensors"
    assert (tmp_path / "two" / name).read_bytes() == (alone / name).read_bytes()


def test_autoguidance_draws_with_a_weaker_model_of_the_same_latents(config, model, tmp_path):
    def weaker(name: str, **changes: object) -> str:
        keys = {"input_size": (2, 4), "in_channels": 2, "num_classes": 3, **changes}
        return str(DiT.from_name("DiT-XXS/1", **keys).save_pretrained(tmp_path / name))

    guide = weaker("guide")  # fresh: it predicts v = 0
    out = run(config("guided", guide=guide, guide_scale=2.0, cfg_scale=1.0, steps=1))
    noise = indexed_noise(range(4), (2, 2, 4), SAMPLING.seed, stream="dit.sample")
    labels = sample_labels(range(4), 3, seed=0)
    with torch.no_grad():
        expected = noise + 2 * guided_velocity(model, labels)(noise, torch.tensor(1.0))
    torch.testing.assert_close(latents(out)["z_n"][:4], expected)
    described = json.loads((out / "sample_set.json").read_text())
    assert described["guide"] == sha256_file(guide) and described["guide_scale"] == 2.0
    for name, changes, message in (
        ("wide", {"input_size": (4, 4)}, r"latents of \(2, 4, 4\), not \(2, 2, 4\)"),
        ("many", {"num_classes": 7}, "7 classes, not 3"),
    ):
        with pytest.raises(UserError, match=message):
            run(config("x", guide=weaker(name, **changes), guide_scale=2.0))
    with pytest.raises(UserError, match="has no effect"):
        run(config("x", guide=guide))
    with pytest.raises(UserError, match="no weights for 'nobody'"):
        run(config("x", guide="nobody", guide_scale=2.0))


def test_a_guide_of_other_latents_is_refused(config, model, tmp_path):
    files = []
    for mean in (0.0, 1.0):
        files.append(tmp_path / f"{mean}.safetensors")
        trained_on = json.dumps({"z_stats": {"mean": [mean]}})
        save_tensors(files[-1], model.state_dict(), {**model.metadata(), "trained_on": trained_on})
    assert load_guide(files[0], files[0], model).num_classes == 3
    with pytest.raises(UserError, match="other statistics"):
        load_guide(files[0], files[1], model)


def test_autocast_changes_the_networks_precision_only(model, config):
    labels = sample_labels(range(4), 3, seed=0)
    for sampler in ("heun", "adaptive"):
        cfg = replace(SAMPLING, sampler=sampler, rtol=0.1, atol=0.1)
        exact = draw(model, range(4), labels, cfg)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = draw(model, range(4), labels, cfg)
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, rounded.bfloat16().float())
        assert not torch.equal(rounded, exact)
    described = json.loads((run(config("bf16", mixed_precision="bf16")) / "sample_set.json").read_text())
    assert described["mixed_precision"] == "bf16"


@pytest.mark.slow
def test_compiled_sampling_compiles_one_network_a_shape_and_changes_rounding_only(config):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Two chunks; euler with guidance inside an interval only: rows of B and of 2 B.
    compiled = latents(run(config("compiled", n=8, compile=True, cfg_interval=(0.5, 1.0))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    plain = latents(run(config("plain", n=8, cfg_interval=(0.5, 1.0))))
    torch.testing.assert_close(compiled["z_n"], plain["z_n"], atol=1e-4, rtol=1e-4)


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

    monkeypatch.setattr(dit.tasks.sample, "draw", interrupted)
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
        patch.setattr(dit.tasks.sample, "draw", interrupted)
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
    for wrong, message in (
        ({"n": 0}, "at least 1"),
        ({"shift": 0.0}, "must be positive"),
        ({"rtol": 0.0, "atol": 0.0}, "must be positive"),
        ({"sde_last_step": 1.0}, "between 0 and 1"),
        ({"cfg_interval": (0.5, 0.2)}, "cfg_interval"),
    ):
        with pytest.raises(UserError, match=message):
            run(config(**wrong))
    assert main(["task=sample", "run_name=nobody", f"ckpt_dir={tmp_path}"]) == 2
    assert "error: no weights for 'nobody'" in capsys.readouterr().err
