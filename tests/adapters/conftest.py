"""An adapter on a small random tokenizer with the statistics of real images' latents."""

from __future__ import annotations

import pytest
import torch

from ssdd import SSDD, LatentNorm
from ssdd.adapters import AutoencoderSSDD
from tests.small_tokenizer import random_tokenizer


@pytest.fixture
def images() -> torch.Tensor:
    """[16, 3, 32, 32] in [-1, 1]: smooth random colours, so that latents differ."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(16, 3, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")


@pytest.fixture
def tokenizer() -> SSDD:
    return random_tokenizer("f8c4").requires_grad_(False)


@pytest.fixture
def norm(tokenizer, images) -> LatentNorm:
    z = tokenizer.encode(images).sample(torch.Generator().manual_seed(1)).double()
    moments = z.mean(dim=(0, 2, 3)), z.var(dim=(0, 2, 3), correction=0)
    return LatentNorm.from_moments(*moments, len(z), tokenizer.encoder_fingerprint())


@pytest.fixture
def vae(tokenizer, norm) -> AutoencoderSSDD:
    return AutoencoderSSDD.from_ssdd(tokenizer, norm)
