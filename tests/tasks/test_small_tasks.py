"""The small tasks and the command line."""

from __future__ import annotations

import json

import pytest
import torch

from ssdd import SSDD, LatentNorm
from ssdd.fidelity.features import load_features
from ssdd.images.batches import eval_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8
from ssdd.images.sources import open_source
from ssdd.main import main
from tests.small_tokenizer import ARGUMENTS


def test_z_stats_equals_a_direct_computation(tokenizer, config, tmp_path):
    tokenizer.save_pretrained(tmp_path / "weights")
    arguments = [
        "task=z_stats",
        "run_name=stats",
        f"ckpt_dir={tmp_path}",
        f"ssdd.encoder_checkpoint={tmp_path / 'weights'}",
    ]
    assert main([*ARGUMENTS, *arguments]) == 0
    norm = LatentNorm.load(tmp_path / "jobs" / "stats" / "z_stats.json", tokenizer.encoder_fingerprint())
    cfg = config()
    dataset = ImageDataset(open_source(cfg.dataset, "train"), cfg.dataset, train=False)
    with torch.no_grad():
        z = torch.cat([tokenizer.encode(from_uint8(x)).mode() for x, _, _ in eval_batches(dataset, 8)]).double()
    assert torch.allclose(norm.mean.double(), z.mean(dim=(0, 2, 3)), atol=1e-6)
    assert torch.allclose(norm.std.double(), z.std(dim=(0, 2, 3), correction=0), rtol=1e-5)
    result = json.loads((tmp_path / "jobs" / "stats" / "task_result.json").read_text())
    assert result["z_mean"] == pytest.approx(z.mean().item(), abs=1e-6)
    assert result["z_std"] == pytest.approx(z.std(correction=0).item(), rel=1e-5)


def test_the_classifier_task_writes_a_feature_network(tmp_path):
    arguments = ["task=classifier", "run_name=judge", f"ckpt_dir={tmp_path}", "training.steps=5"]
    assert main([*ARGUMENTS, *arguments]) == 0
    network = load_features(f"classifier:{tmp_path / 'jobs' / 'judge' / 'classifier.safetensors'}")
    assert network(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 128)


def test_mistakes_end_with_one_line_and_status_2(capsys):
    assert main(["ssdd.decodr=S"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "ssdd.decoder" in error and error.count("\n") == 1


def test_a_saved_tokenizer_needs_no_arguments(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert SSDD.from_pretrained(tmp_path / "model.safetensors").config == tokenizer.config
