"""Training learns, resumes to the same bytes, is the same on any number of processes, and refuses what misfits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dit.config import DiTConfig
from dit.model import DiT
from dit.objective import step_draws
from dit.tasks.train import run
from ssdd.engine.ema import Ema
from ssdd.engine.errors import UserError
from ssdd.engine.schema import to_yaml
from ssdd.model.tokenizer import SSDD
from tests.kills import AtCall, Command

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def folder(cfg: DiTConfig) -> Path:
    return Path(cfg.ckpt_dir) / "jobs" / cfg.run_name


def in_step(step: int, averages: int = 1) -> AtCall:
    """The moment in a step when the last of so many averages is to be updated."""
    return AtCall(step * averages, ("ssdd.engine.ema:Ema.update",))


def command(cfg: DiTConfig, processes: int = 1) -> Command:
    """`python -m dit.main` with the keys of `cfg`."""
    config = Path(cfg.ckpt_dir) / f"{cfg.run_name}.yaml"
    config.write_text(to_yaml(cfg))
    return Command("dit.main", [f"preset={config}"], processes)


def weights(cfg: DiTConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder(cfg) / "checkpoints" / "last").glob("*.safetensors")}


SPEED = ("images_per_s", "data_wait", "memory", "mfu")


def metrics(cfg: DiTConfig) -> list[dict]:
    """The lines of the run, but for what depends on the machine's load."""
    rows = [json.loads(line) for line in (folder(cfg) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in SPEED} for row in rows]


def signal_after(monkeypatch: pytest.MonkeyPatch, number: int, updates: int) -> None:
    """Let this process send itself a signal in its `updates`-th step from now."""
    original, seen = Ema.update, []

    def update(self: Ema, parameters: dict[str, torch.Tensor]) -> None:
        original(self, parameters)
        seen.append(1)
        if len(seen) == updates:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Ema, "update", update)


def test_thirty_steps_lower_the_loss_and_leave_a_complete_run(settings):
    cfg = settings(steps=30, log_freq=10)
    result = run(cfg)
    rows = metrics(cfg)
    assert [row["step"] for row in rows] == [1, 10, 20, 30]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert json.loads((folder(cfg) / "task_result.json").read_text()) == result
    assert result["loss"] == rows[-1]["loss"] and result["images"] == 480
    files = {path.name for path in (folder(cfg) / "checkpoints" / "last").iterdir()}
    assert files == {f"{n}.safetensors" for n in ("model", "model_ema", "optimizer", "aux")} | {"state.json"}
    model = DiT.from_pretrained(cfg.run_name, cfg.ckpt_dir)
    assert model.config["name"] == "DiT-XXS/1" and model.config["input_size"] == [4, 4]
    assert (model.in_channels, model.num_classes, model.time_scale) == (2, 10, 1000.0)
    torch.testing.assert_close(model.pos_embed, DiT.from_name("DiT-XXS/1", 4).pos_embed)


def test_a_killed_run_resumes_to_the_same_bytes(settings):
    straight, killed = settings("straight", "moments"), settings("killed", "moments")
    run(straight)
    command(killed).kill(in_step(7))
    assert [row["step"] for row in metrics(killed)] == [1, 2, 3, 4, 5, 6]  # two of them after the checkpoint
    run(killed)
    assert weights(killed) == weights(straight)
    assert metrics(killed) == metrics(straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_checkpoints_exits_with_zero_and_resumes_to_the_same_bytes(settings, monkeypatch, number):
    straight, stopped = settings("straight", log_freq=3), settings("stopped", log_freq=3)
    run(straight)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        signal_after(patch, number, updates=5)
        run(stopped)
    assert ended.value.code == 0
    state = json.loads((folder(stopped) / "checkpoints" / "last" / "state.json").read_text())
    assert state["step"] == 5
    assert not (folder(stopped) / "task_result.json").exists()
    run(stopped)
    assert weights(stopped) == weights(straight)
    assert metrics(stopped) == metrics(straight)


def test_a_signal_checkpoints_without_drawing_samples_first(settings, caches, monkeypatch):
    cfg = settings(tokenizer=str(caches["mean"].parent / "tokenizer"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_after(patch, signal.SIGTERM, updates=2)
        run(cfg)
    assert (folder(cfg) / "checkpoints" / "last").exists() and not (folder(cfg) / "pictures").exists()


def run_in_two_processes(cfg: DiTConfig) -> None:
    config = Path(cfg.ckpt_dir) / f"{cfg.run_name}.yaml"
    config.write_text(to_yaml(cfg))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(ROOT / "dit" / "main.py"), f"preset={config}"]
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}  # a path finds its packages
    ended = subprocess.run(command, cwd=cfg.ckpt_dir, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_two_processes_train_as_one(settings):
    one, two = settings("one", steps=3), settings("two", steps=3)
    run(one)
    run_in_two_processes(two)
    for row_one, row_two in zip(metrics(one), metrics(two), strict=True):
        assert row_two == pytest.approx(row_one, rel=1e-5 if row_one["step"] == 1 else 1e-3)
    first, second = (DiT.from_pretrained(cfg.run_name, cfg.ckpt_dir).state_dict() for cfg in (one, two))
    for key in first:
        torch.testing.assert_close(second[key], first[key], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_sharded_processes_train_as_data_parallel_ones_and_continue_on_any_number(settings):
    options = {"steps": 4, "save_every": 2, "keep": 2, "grad_accumulate": 2, "grad_checkpoint": True}
    whole, sharded = settings("whole", **options), settings("sharded", fsdp=True, **options)
    run_in_two_processes(whole)
    run_in_two_processes(sharded)
    for row_whole, row_sharded in zip(metrics(whole), metrics(sharded), strict=True):
        assert row_sharded == pytest.approx(row_whole, rel=1e-5)
    for name in ("model", "model_ema", "optimizer", "aux"):
        places = (folder(cfg) / "checkpoints/last" / f"{name}.safetensors" for cfg in (whole, sharded))
        first, second = map(load_file, places)
        torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-3)
    for name, fsdp, launch in (("two", True, run_in_two_processes), ("one", False, run)):
        shutil.copytree(folder(sharded) / "checkpoints/step-000002", folder(sharded).parent / name / "checkpoints/last")
        continued = settings(name, **options, fsdp=fsdp)
        launch(continued)
        for row_again, row in zip(metrics(continued), metrics(sharded)[2:], strict=True):
            assert row_again == pytest.approx(row, rel=1e-5)


def test_accumulation_changes_memory_and_not_the_loss(settings):
    whole, parts = settings("whole", steps=3), settings("parts", steps=3, grad_accumulate=4)
    run(whole)
    run(parts)
    for row_whole, row_parts in zip(metrics(whole), metrics(parts), strict=True):
        assert row_parts == pytest.approx(row_whole, rel=1e-3)


def test_the_newest_regular_checkpoints_are_kept_as_they_were_and_can_be_named(settings):
    short, long = settings("short", steps=8), settings("long", keep=2, save_every=2)
    run(short)
    run(long)
    kept = {path.name for path in (folder(long) / "checkpoints").iterdir()}
    assert kept == {"last", "step-000008", "step-000010"}
    at_8, at_10 = (folder(long) / "checkpoints" / name for name in ("step-000008", "step-000010"))
    assert (at_8 / "model.safetensors").read_bytes() == weights(short)["model.safetensors"]
    assert {path.name: path.read_bytes() for path in at_10.glob("*.safetensors")} == weights(long)
    assert DiT.from_pretrained("long@step-000008", long.ckpt_dir).config["name"] == "DiT-XXS/1"


def test_pictures_and_recomputation_change_no_byte_and_the_tokenizer_must_be_that_of_the_cache(settings, caches):
    plain, drawn = settings("plain", steps=4), settings("drawn", steps=4)
    run(plain)
    drawn.training.sample_every, drawn.training.tokenizer = 2, str(caches["mean"].parent / "tokenizer")
    drawn.sampling.steps = 2
    drawn.training.grad_checkpoint = True
    run(drawn)
    assert weights(drawn) == weights(plain)
    pictures = sorted((folder(drawn) / "pictures").iterdir())
    assert [path.name for path in pictures] == ["samples-000002.png", "samples-000004.png"]
    with Image.open(pictures[1]) as image:
        assert image.size == (8 * 64 + 7 * 2, 2 * 64 + 2)  # sixteen digits of 32 px, enlarged
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    assert not (folder(plain) / "pictures").exists()
    SSDD({"name": "f8c2", "width": 16}, "XXS", encoder_train=True).save_pretrained(Path(drawn.ckpt_dir) / "other")
    drawn.training.tokenizer = str(Path(drawn.ckpt_dir) / "other")
    with pytest.raises(UserError, match="encoder"):
        run(drawn)
    with pytest.raises(UserError, match="training.tokenizer="):
        run(settings(sample_every=2))


def test_samples_in_training_need_no_guide_and_wrong_sampling_keys_are_refused_before_the_first_step(settings, caches):
    cfg = settings(steps=1, tokenizer=str(caches["mean"].parent / "tokenizer"))
    cfg.sampling.steps, cfg.sampling.guide, cfg.sampling.guide_scale = 1, "missing", 2.0
    run(cfg)
    assert [path.name for path in (folder(cfg) / "pictures").iterdir()] == ["samples-000001.png"]
    wrong = settings("wrong", tokenizer=cfg.training.tokenizer)
    wrong.sampling.cfg_interval = (0.7, 0.1)
    with pytest.raises(UserError, match="sampling.cfg_interval"):
        run(wrong)
    assert not folder(wrong).exists()


def test_a_finished_run_can_be_asked_again_and_prolonged(settings):
    short, long = settings("run", steps=5), settings("run", steps=8)
    result = run(short)
    before = weights(short)
    assert run(short) == result and weights(short) == before
    run(long)
    straight = settings("straight", steps=8)
    run(straight)
    assert [row["step"] for row in metrics(long)] == list(range(1, 9))
    assert weights(long)["model.safetensors"] == weights(straight)["model.safetensors"]
    with pytest.raises(UserError, match="beyond training.steps=5"):
        run(short)


def test_a_loss_that_is_not_finite_is_an_error_that_names_its_step(settings, monkeypatch):
    cfg = settings(log_freq=5)
    original, seen = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        seen.append(1)
        value = original(self, *arguments)
        if len(seen) == 2:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return value

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match="not finite at step 3"):
        run(cfg)
    assert not (folder(cfg) / "checkpoints" / "last").exists()


def test_what_does_not_fit_together_is_refused_before_the_first_step(settings, caches):
    cfg = settings()
    cfg.cache = None
    with pytest.raises(UserError, match="cache=DIR"):
        run(cfg)
    cfg.cache = str(caches["mean"] / "missing")
    with pytest.raises(UserError, match="no latent cache"):
        run(cfg)
    cfg = settings()
    cfg.model.name = "DiT-XXS/8"
    with pytest.raises(UserError, match="4x4 does not divide into patches of 8"):
        run(cfg)
    wrong = {
        "multiple of 3": {"grad_accumulate": 3},
        "t_shift=0": {"t_shift": 0.0},
        "grad_clip=-1": {"grad_clip": -1.0},
    }
    for message, training in wrong.items():
        with pytest.raises(UserError, match=message):
            run(settings(**training))
    assert not folder(cfg).exists()


def test_another_cache_or_model_does_not_continue_a_run(settings):
    run(settings(steps=1))
    with pytest.raises(UserError, match="cache was .* another run_name"):
        run(settings(steps=2, content="moments"))
    cfg = settings(steps=2)
    cfg.model.learn_sigma = True
    with pytest.raises(UserError, match="learn_sigma was False, is True"):
        run(cfg)


def test_draws_are_a_function_of_seed_and_step(settings):
    cfg = settings()
    shape, device = (4000, 1, 1, 1), torch.device("cpu")
    draws, again = step_draws(cfg, 7, shape, device), step_draws(cfg, 7, shape, device)
    assert torch.equal(draws.t, again.t) and torch.equal(draws.eps, again.eps) and torch.equal(draws.drop, again.drop)
    assert not torch.equal(draws.t, step_draws(cfg, 8, shape, device).t)
    assert 0.08 < draws.drop.float().mean() < 0.12
    assert abs(torch.logit(draws.t).std() - 1) < 0.05  # logit-normal
    cfg.training.t_sampling = "uniform"
    assert abs(step_draws(cfg, 7, shape, device).t.std() - 12**-0.5) < 0.02


def test_dropped_labels_become_the_null_class_and_none_without_dropout(settings):
    cfg = settings(steps=2)
    cfg.model.class_dropout = 0.0
    run(cfg)
    model = DiT.from_pretrained(cfg.run_name, cfg.ckpt_dir)
    assert not model.null_class and len(model.y_embedder.embedding_table.weight) == 10


def test_a_cache_at_a_url_trains_and_resumes_to_the_same_bytes(settings, tmp_path):
    def stream(name: str, **training: object) -> DiTConfig:
        cfg = settings(name, **training)
        return replace(cfg, cache=f"file://{cfg.cache}", cache_dir=str(tmp_path / "shards"))

    run(stream("whole", steps=6))
    run(stream("parts", steps=4))
    run(stream("parts", steps=6))
    assert weights(stream("parts")) == weights(stream("whole"))
    with pytest.raises(UserError, match=r"is a URL: cache_dir=DIR must be given"):
        run(replace(stream("third"), cache_dir=None))
