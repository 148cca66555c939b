"""Reconstruction figures: independent of the batch size, equal for equal decoders, and right on a closed case."""

from __future__ import annotations

import pytest

from ssdd.engine.errors import UserError
from ssdd.tasks.evaluate import run
from ssdd.tasks.train import run as train


@pytest.fixture
def trained(config):
    train(config("training.steps=2", "ssdd.encoder_train=true"))
    return config


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
    with pytest.raises(UserError, match="two or more"):
        run(trained(*command, "evaluation.noise_draws=1"))
