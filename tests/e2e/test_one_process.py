"""Tasks of any precision run one after the other in one process, and every result says which one it was made in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssdd.engine.checkpoint import load_tensors
from ssdd.engine.files import read_json
from ssdd.engine.precision import VARIABLE, cpu_capability
from tests.e2e.one_process import Chain

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("tokenizer", "student", "evaluation", "z_stats", "cache", "generator", "samples", "generation")


@pytest.fixture(scope="session", params=["no", "bf16"])
def forced(request, tmp_path_factory) -> tuple[str, Path, dict[str, dict]]:
    """(what `auto` is forced to, folder, what every task said): all tasks in this process, none names a precision."""
    chain = Chain(tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, request.param)
        return request.param, chain.folder, {task: getattr(chain, task)() for task in TASKS}


def test_every_result_says_its_precision_and_why(forced):
    name, _, results = forced
    chosen = {"mixed_precision": name, "why": f"auto: {name}, {VARIABLE}", "cpu": cpu_capability()}
    always = {"mixed_precision": "no", "why": "always float32", "cpu": cpu_capability()}
    wanted = {task: always if task in ("z_stats", "cache") else chosen for task in TASKS}
    assert {task: result["precision"] for task, result in results.items()} == wanted


def test_weights_and_latents_are_float32_and_finite_in_any_precision(forced):
    _, folder, results = forced
    for run in ("tokenizer", "student", "generator"):
        for name in ("model", "model_ema", "optimizer"):
            for key, tensor in load_tensors(
                folder / "jobs" / run / "checkpoints" / "last" / f"{name}.safetensors"
            ).items():
                assert tensor.dtype in (torch.float32, torch.float64, torch.int64), (run, name, key)
                assert tensor.isfinite().all()
    assert load_tensors(folder / "samples" / "latents.safetensors")["z_n"].dtype == torch.float32
    for row in results["evaluation"]["rows"]:
        assert 5 < row["PSNR"] < 40


def test_a_notebook_mixes_precisions_as_it_likes(tmp_path, monkeypatch, capsys):
    """bf16 and float32 in turns, in the order in which people work, and once more the other way round."""
    monkeypatch.delenv(VARIABLE, raising=False)
    chain = Chain(tmp_path)
    found = [
        chain.tokenizer("training.mixed_precision=bf16"),
        chain.student("training.mixed_precision=no"),
        chain.evaluation(),
        chain.z_stats(),
        chain.tokenizer("training.mixed_precision=no", run="exact"),
        chain.cache(),
        chain.generator("training.mixed_precision=bf16"),
        chain.samples(),
        chain.generation(),
        chain.evaluation("training.mixed_precision=bf16"),
        chain.samples("sampling.mixed_precision=bf16"),
        chain.generation("evaluation.mixed_precision=bf16"),
        chain.tokenizer("training.mixed_precision=bf16", run="again"),
    ]
    names = [result["precision"]["mixed_precision"] for result in found]
    assert names == ["bf16", "no", "no", "no", "no", "no", "bf16", "no", "no", "bf16", "bf16", "bf16", "bf16"]
    assert "precision bf16" in capsys.readouterr().err
    last = Path("checkpoints") / "last" / "model.safetensors"
    first, exact, again = (load_tensors(tmp_path / "jobs" / run / last) for run in ("tokenizer", "exact", "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)  # what ran between has left nothing behind
    assert any(not torch.equal(first[key], exact[key]) for key in first)
    close = {key: (first[key] - exact[key]).abs().max().item() for key in first}
    assert max(close.values()) < 2 * 3 * 1e-3  # three steps of AdamW at 1e-3, in directions that may differ


def test_two_processes_run_all_tasks_without_starting_anew(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "tests" / "e2e" / "one_process.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(tmp_path / "generation" / "task_result.json")
    assert result["count"] == 8 and result["precision"]["mixed_precision"] == "no"
    assert read_json(tmp_path / "jobs" / "tokenizer" / "task_result.json")["precision"]["mixed_precision"] == "bf16"
