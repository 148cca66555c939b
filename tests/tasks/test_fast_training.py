"""Training, distilling and evaluating a fast decoder with the tokenizer's own tasks."""

from __future__ import annotations

import json

import pytest
import torch

from ssdd import SSDD
from ssdd.config import SSDDConfig
from ssdd.engine.cli import parse
from ssdd.model.fast_decoder import FAST_SIZES, FastSize
from ssdd.tasks.train import run
from tests.small_tokenizer import ARGUMENTS


@pytest.fixture
def small(monkeypatch):
    """F-XS with few channels."""
    monkeypatch.setitem(FAST_SIZES, "F-XS", FastSize(16, 2, (8, 8, 4)))


def test_it_trains_and_is_distilled_as_any_decoder(small, tmp_path):
    def train(name: str, *arguments: str) -> dict:
        options = ["ssdd.decoder=F-XS", "training.optimizer=adamw"]  # the default changes nothing in its first steps
        argv = [*ARGUMENTS, *options, f"ckpt_dir={tmp_path}", f"run_name={name}", *arguments]
        return run(parse(SSDDConfig, argv, program="ssdd", description=""))

    train("teacher", "training.steps=3", "ssdd.encoder_train=true")
    train("student", "training.steps=3", "ssdd.checkpoint=teacher", "distill_teacher=true", "ssdd.fm_sampler.steps=2")
    teacher, student = (SSDD.from_pretrained(name, tmp_path) for name in ("teacher", "student"))
    assert teacher.decoder.conv_out.weight.any()  # zero before training
    assert not torch.equal(teacher.decoder.conv_out.weight, student.decoder.conv_out.weight)
    assert student.config["decoder"] == "F-XS" and student.config["fm_sampler"]["steps"] == 1
    metrics = (tmp_path / "jobs" / "student" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["diffusion"] > 0
