"""Training, distilling and evaluating a fast decoder with the tokenizer's own tasks."""

from __future__ import annotations

import json

import pytest

from ssdd import SSDD
from ssdd.config import SSDDConfig
from ssdd.engine.cli import parse
from ssdd.tasks.train import run
from tests.small_tokenizer import ARGUMENTS


@pytest.fixture
def small(monkeypatch):
    """F-XS with few channels."""
    from ssdd.model.fast_decoder import FAST_SIZES, FastSize

    monkeypatch.setitem(FAST_SIZES, "F-XS", FastSize(16, 2, (8, 8, 4)))


def test_it_trains_and_is_distilled_as_any_decoder(small, tmp_path):
    def train(name: str, *arguments: str) -> dict:
        argv = [*ARGUMENTS, "ssdd.decoder=F-XS", f"ckpt_dir={tmp_path}", f"run_name={name}", *arguments]
        return run(parse(SSDDConfig, argv, program="ssdd", description=""))

    train("teacher", "training.steps=3", "ssdd.encoder_train=true")
    train("student", "training.steps=2", "ssdd.checkpoint=teacher", "distill_teacher=true", "ssdd.fm_sampler.steps=2")
    student = SSDD.from_pretrained("student", tmp_path)
    assert student.config["decoder"] == "F-XS" and student.config["fm_sampler"]["steps"] == 1
    metrics = (tmp_path / "jobs" / "student" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["diffusion"] > 0
