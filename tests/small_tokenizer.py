"""Tokenizers and a training command small enough for tests: digits at 16 px, decoder XXS, narrow encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from ssdd import SSDD
from ssdd.config import SSDDConfig
from ssdd.engine.cli import parse

Module = TypeVar("Module", bound=torch.nn.Module)

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
    return random_tokenizer("f8c2")


def random_tokenizer(encoder: str) -> SSDD:
    """As the fixture, the same at every call, with the encoder of this name and 8 channels."""
    torch.manual_seed(0)
    model = SSDD({"name": encoder, "width": 8}, "XXS", encoder_train=True)
    filled(model.decoder)
    return model


def filled(network: Module) -> Module:
    """No weight stays zero, so that every output and gradient depends on it; in place."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return network


def save_encoder(folder: Path) -> Path:
    """Save an f8c2 tokenizer whose posteriors have clear means and variances, without drawing from torch's stream."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SSDD({"name": "f8c2", "width": 16}, "XXS", encoder_train=True)
        with torch.no_grad():
            model.encoder.out_proj.bias.copy_(torch.tensor([0.5, -2.0, -1.0, 1.0]))
    model.save_pretrained(folder)
    return folder


def random_vae(scaling_factor: float, shift_factor: float | None = None) -> Any:
    """diffusers' AutoencoderKL of stride 2 and 16 channels."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )
