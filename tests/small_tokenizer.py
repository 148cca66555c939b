"""A tokenizer and a training command small enough for tests: digits at 16 px, decoder XXS, narrow encoder."""

from __future__ import annotations

import pytest
import torch

from ssdd import SSDD
from ssdd.config import SSDDConfig
from ssdd.engine.cli import parse

ARGUMENTS = [
    "dataset.source=digits",
    "dataset.im_size=16",
    "dataset.limit=32",
    "dataset.batch_size=8",
    "ssdd.encoder=f8c2",
    "ssdd.encoder_width=8",
    "ssdd.decoder=XXS",
    "training.compile=false",
    "ssdd.fm_sampler.steps=2",
    "losses.lpips=0",
    "losses.repa=0",
    "training.mixed_precision=no",
    "training.eval_freq=0",
    "training.log_freq=1",
    "training.save_every=2",
    "training.mixed_precision=no",  # auto is bfloat16 on some CPUs: slower at these sizes, and other bits
    "evaluation.features=[]",
]


@pytest.fixture
def config(tmp_path):
    """Makes a config from the small arguments and further ones."""

    def make(*arguments: str) -> SSDDConfig:
        argv = [*ARGUMENTS, f"ckpt_dir={tmp_path}", "run_name=tokenizer", *arguments]
        return parse(SSDDConfig, argv, program="ssdd", description="")

    return make


@pytest.fixture
def tokenizer() -> SSDD:
    """A random tokenizer whose decoder depends on everything: no weight is zero."""
    torch.manual_seed(0)
    model = SSDD({"name": "f8c2", "width": 8}, "XXS", encoder_train=True)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model
