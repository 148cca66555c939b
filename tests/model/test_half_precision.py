"""Half precisions stay finite and near, torch.compile takes the decoder whole, torch.export a one-step decode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ssdd import SSDD


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_half_precision_is_finite_for_wide_latents_and_near_float32(tokenizer, dtype, way):
    z, noise = 20 * torch.randn(2, 2, 3, 2), torch.randn(2, 3, 24, 16)
    expected = tokenizer.decode(z, steps=3, noise=noise)
    if way == "weights":
        half = copy.deepcopy(tokenizer).to(dtype)
        found, posterior = half.decode(z.to(dtype), steps=3, noise=noise), half.encode(noise.to(dtype))
    else:
        with torch.autocast("cpu", dtype):
            found, posterior = tokenizer.decode(z, steps=3, noise=noise), tokenizer.encode(noise)
    assert found.dtype == posterior.mean.dtype == torch.float32
    assert found.isfinite().all() and posterior.parameters.isfinite().all()
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]  # traced alike; inductor's C++ takes minutes


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_decoder_compiles_without_a_break_and_sees_changed_weights(tokenizer, backend):
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 2, 2, 2)
    compiled = torch.compile(tokenizer.decoder, fullgraph=True, backend=backend)
    with torch.no_grad():
        before = tokenizer.decoder(x, 0.5, z)
        assert (compiled(x, torch.tensor(0.5), z) - before).abs().max() < 1e-4
        block = tokenizer.decoder.mid_block.transformer_blocks[0]
        block.relative_position_bias.relative_bias_table[8, 7] += 5
        after = tokenizer.decoder(x, 0.5, z)
        assert (after - before).abs().max() > 1e-5
        assert (compiled(x, torch.tensor(0.5), z) - after).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiling_the_tokenizer_changes_neither_its_images_nor_its_state_dict(tokenizer, backend):
    z, noise = torch.randn(1, 2, 2, 2), torch.randn(1, 3, 16, 16)
    before, keys = tokenizer.decode(z, steps=2, noise=noise), list(tokenizer.state_dict())
    tokenizer.compile(backend=backend)
    assert (tokenizer.decode(z, steps=2, noise=noise) - before).abs().max() < 1e-4
    assert list(tokenizer.state_dict()) == keys
    with torch.no_grad():
        block = tokenizer.decoder.mid_block.transformer_blocks[0]
        block.relative_position_bias.relative_bias_table[8, 7] += 5
    after = copy.deepcopy(tokenizer).decode(z, steps=2, noise=noise)  # a copy is not compiled
    assert (after - before).abs().max() > 1e-5
    assert (tokenizer.decode(z, steps=2, noise=noise) - after).abs().max() < 1e-5


class OneStep(nn.Module):
    """What a deployment exports: latent and noise in, image out."""

    def __init__(self, tokenizer: SSDD):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, z, noise):
        return self.tokenizer.decode(z, steps=1, noise=noise)


def test_a_one_step_decode_is_exported():
    model = SSDD({"name": "f8c4", "width": 8}, {"size": "XS", "layers": 2}).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    z, noise = torch.randn(1, 4, 8, 12), torch.randn(1, 3, 64, 96)
    exported = torch.export.export(OneStep(model), (z, noise))
    other = torch.randn(1, 4, 8, 12), torch.randn(1, 3, 64, 96)
    assert (exported.module()(*other) - OneStep(model)(*other)).abs().max() < 1e-4
