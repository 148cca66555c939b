"""Reconstruction figures: independent of the batch size, equal for equal decoders, and right on a closed case."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ssdd.engine.errors import UserError
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.fidelity.features import FeatureNetwork
from ssdd.model.compared_decoders import Row, open_rows
from ssdd.tasks import evaluate as evaluation_task
from ssdd.tasks.evaluate import Evaluator, run
from ssdd.tasks.train import run as train


@pytest.fixture
def trained(config):
    train(config("training.steps=2", "ssdd.encoder_train=true"))
    return config


def opened(cfg) -> Evaluator:
    return Evaluator(cfg, Processes(0, 1, torch.device("cpu")), Precision.float32("cpu"))


def evaluate(config, *arguments: str) -> dict:
    decoders = "evaluation.decoders=[two:tokenizer:2,again:tokenizer:2,one:tokenizer:1]"
    return run(config("task=eval", "run_name=eval", decoders, "evaluation.features=[efficientnet_lite0]", *arguments))


def test_figures_do_not_depend_on_batch_size_and_equal_decoders_score_equally(trained, tmp_path):
    large, small = (evaluate(trained, f"evaluation.batch_size={n}", "evaluation.baselines=true") for n in (32, 5))
    assert [row["name"] for row in large["rows"]] == ["two", "again", "one", "PCA-8", "blur"]
    for a, b in zip(large["rows"], small["rows"], strict=True):
        for metric in ("PSNR", "SSIM", "MSE", "MAE", "lite0_distance"):
            assert a[metric] == pytest.approx(b[metric], rel=1e-4)
        assert a["distances"]["efficientnet_lite0"]["kid"] == pytest.approx(
            b["distances"]["efficientnet_lite0"]["kid"], rel=1e-4
        )
    two, again, one, pca, blur = large["rows"]
    assert blur["power_ratio"] < 0.9 and two["power_ratio"] == again["power_ratio"]
    assert two["PSNR"] == again["PSNR"] != one["PSNR"]
    assert large["paired"]["efficientnet_lite0"]["two - again"] == {"kid": 0.0, "low": 0.0, "high": 0.0}
    assert pca["PSNR"] > one["PSNR"] and pca["distances"]["efficientnet_lite0"]["kid"] < 1e3
    assert large["floor"]["efficientnet_lite0"]["frechet"] > 0 and large["count"] == 32
    pictures = {path.stem for path in (tmp_path / "jobs" / "eval" / "pictures").iterdir()}
    assert pictures == {"originals", "two", "again", "one", "PCA-8", "blur"}


def test_the_originals_are_measured_once_however_often_a_run_is_evaluated(trained, monkeypatch):
    measured, measure_once = [], evaluation_task.measure_once
    monkeypatch.setattr(evaluation_task, "measure_once", lambda *given: measured.append(1) or measure_once(*given))
    evaluator = opened(trained("evaluation.features=[efficientnet_lite0]"))
    rows = open_rows(["one:tokenizer:1"], trained().ckpt_dir, torch.device("cpu"))
    first, second = (evaluator.run(rows)["rows"][0]["distances"] for _ in range(2))
    assert len(measured) == 1 and first == second


def test_step_counts_of_one_checkpoint_are_rows(trained):
    steps = ("ssdd.checkpoint=tokenizer", "evaluation.steps=[1,3]", "evaluation.noise_draws=2")
    rows = run(trained("task=eval", "run_name=eval", *steps))["rows"]
    assert [(row["name"], row["steps"]) for row in rows] == [("steps-1", 1), ("steps-3", 3)]
    assert rows[0]["noise_r2"] == 1 > rows[1]["noise_r2"]


def test_nothing_to_evaluate_and_unknown_runs_are_errors(config):
    with pytest.raises(UserError, match="ssdd.checkpoint"):
        run(config("task=eval"))
    with pytest.raises(UserError, match="name:checkpoint reference:steps"):
        run(config("task=eval", "evaluation.decoders=[student]"))
    with pytest.raises(UserError, match="no weights for 'nobody'"):
        run(config("task=eval", "evaluation.decoders=[student:nobody:1]"))


def test_the_time_grid_of_the_command_line_is_used_and_no_pictures_are_an_option(trained, tmp_path):
    command = ("task=eval", "run_name=eval", "ssdd.checkpoint=tokenizer", "show_samples=0")
    one, other = (run(trained(*command, f"ssdd.fm_sampler.t_pow_shift={power}"))["rows"][0]["PSNR"] for power in (2, 1))
    assert one != other
    assert not (tmp_path / "jobs" / "eval" / "pictures").exists()
    with pytest.raises(UserError, match="set 2 or more"):
        run(trained(*command, "evaluation.noise_draws=1"))


class Darkened:
    """Stands for a tokenizer: subtracts 1/8 from every pixel of the first image of a batch, and 1/4 from others."""

    def encode(self, x):
        return SimpleNamespace(mode=lambda: x)

    def decode(self, z, steps, noise):
        return z - torch.tensor([0.25] + [0.5] * (len(z) - 1)).view(-1, 1, 1, 1)


class FewNumbers(nn.Module):
    def forward(self, images):
        return images.float().mean(dim=(2, 3))[:, :2] / 255


def few_inception_numbers(monkeypatch):
    """A network of two numbers stands for Inception."""

    def load(names, device):
        return [FeatureNetwork(name, 2, "", FewNumbers()) for name in dict.fromkeys(names) if name == "inception"]

    monkeypatch.setattr(evaluation_task, "load_networks", load)


def test_figures_are_those_of_numpy(config, monkeypatch):
    few_inception_numbers(monkeypatch)
    evaluation = opened(config("dataset.limit=5", "evaluation.metrics=[FID]"))
    row = evaluation.run([Row("dark", Darkened(), 1)])["rows"][0]
    originals = np.stack([evaluation.dataset[i][0].numpy() for i in range(5)]).astype(float)
    subtracted = np.array([0.25] + [0.5] * 4).reshape(-1, 1, 1, 1) * 127.5
    images = np.floor(np.clip(originals - subtracted, 0, 255) + 0.5)
    mse = ((images - originals) ** 2).mean(axis=(1, 2, 3)) / 255**2
    assert row["MSE"] == pytest.approx(1000 * mse.mean(), rel=1e-3)
    assert row["MAE"] == pytest.approx(np.abs(images - originals).mean() / 255, rel=1e-3)
    assert row["PSNR"] == pytest.approx((-10 * np.log10(mse)).mean(), rel=1e-3)
    assert row["PSNR_pooled"] == pytest.approx(-10 * math.log10(mse.mean()), rel=1e-3)
    assert row["PSNR_pooled"] < row["PSNR"] - 0.1
    a, b = (x.mean(axis=(2, 3))[:, :2] / 255 for x in (images, originals))
    # The digits are grey: both numbers are the same, the covariances of rank one with the square roots of the traces.
    deviation = [np.sqrt(np.trace(np.cov(x.T))) for x in (a, b)]
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (deviation[0] - deviation[1]) ** 2
    assert row["rFID"] == row["distances"]["inception"]["frechet"] == pytest.approx(expected, rel=1e-2)


def test_a_few_images_are_not_judged_by_fid_and_that_is_said_once(config, monkeypatch, caplog):
    few_inception_numbers(monkeypatch)
    few, enough = (opened(config(f"dataset.limit={n}", "evaluation.metrics=[FID]")) for n in (19, 20))
    scores = {"PSNR": 20.0, "PSNR_pooled": 19.0, "rFID": 3.0, "MSE": 10.0}
    caplog.set_level(logging.WARNING)
    assert enough.deciding(scores, "FID") == ("FID", -3.0) and not caplog.records
    assert few.deciding(scores, "FID") == few.deciding(scores, "FID") == ("PSNR", 20.0)
    assert "19 images are fewer than the 20" in caplog.text and len(caplog.records) == 1
    assert few.deciding(scores, "MSE") == ("MSE", -10.0)
    assert few.deciding(scores, "PSNR_pooled") == ("PSNR_pooled", 19.0)
    assert enough.deciding({"PSNR": 20.0}, "LPIPS") == ("PSNR", 20.0) and "not measured" in caplog.text


def test_named_metrics_must_be_there_and_auto_says_what_is_missing(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    command = ("task=eval", "run_name=eval", "ssdd.checkpoint=tokenizer")
    for metric, message in (("FID", "weights-inception"), ("LPIPS", "alexnet-owt"), ("DreamSim", "dreamsim")):
        with pytest.raises(UserError, match=message):
            run(trained(*command, f"evaluation.metrics=[{metric}]"))
    with pytest.raises(UserError, match="did you mean DreamSim"):
        trained(*command, "evaluation.metrics=[Dreamsim]")
    result = run(trained(*command, "evaluation.metrics=auto"))
    assert result["left_out"] == ["LPIPS", "DreamSim"]
    assert "lite0_distance" in result["rows"][0] and "LPIPS" not in result["rows"][0]
    pixels = run(trained(*command, "evaluation.metrics=PSNR"))
    assert pixels["left_out"] == [] and "lite0_distance" not in pixels["rows"][0]
