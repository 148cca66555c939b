"""R2 over the noise: one for the reference itself, zero for its mean image, below for anything worse."""

from __future__ import annotations

import copy

import pytest
import torch

from ssdd.engine.random import indexed_noise
from ssdd.model.compared_decoders import Row
from ssdd.tasks.noise_agreement import noise_agreement


class Blind:
    """A tokenizer whose images do not depend on the noise."""

    def __init__(self, image):
        self.image = image

    def encode(self, x):
        return self

    def mode(self):
        return None

    def decode(self, z, steps, noise):
        return self.image


def test_agreement_of_a_decoder_with_itself_its_mean_and_nothing(tokenizer):
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    reference = Row("teacher", tokenizer, 2)
    assert noise_agreement(reference, reference, [x], draws=3, seed=0) == 1
    other = copy.deepcopy(tokenizer)
    with torch.no_grad():
        other.decoder.conv_out.weight.mul_(1.1)
    moved = noise_agreement(Row("moved", other, 2), reference, [x], draws=3, seed=0)
    assert moved < 1
    assert noise_agreement(Row("moved", other, 2), reference, x.split(3), draws=3, seed=0) == pytest.approx(
        moved, rel=1e-4
    )
    z = tokenizer.encode(x).mode()
    images = [
        tokenizer.decode(z, steps=2, noise=indexed_noise(range(4), (3, 16, 16), 0, f"agreement.{draw}"))
        for draw in range(3)
    ]
    mean = Row("mean", Blind(torch.stack(images).mean(dim=0)), 1)
    assert noise_agreement(mean, reference, [x], draws=3, seed=0) == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="no spread"):
        noise_agreement(mean, reference, [x], draws=1, seed=0)
