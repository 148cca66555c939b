"""The encoder's parts against closed forms, and its posterior at every stride."""

from __future__ import annotations

import math

import pytest
import torch

from ssdd.model.encoder import Encoder, EncoderAttention, EncoderDownsample, parse_encoder_name
from ssdd.model.norms import GroupNorm
from ssdd.model.tokenizer import SSDD


def test_names_say_stride_and_channels():
    assert [parse_encoder_name(name) for name in ("f4c3", "f8c4", "f64c128")] == [(4, 3), (8, 4), (64, 128)]


@pytest.mark.parametrize("name", ["", "f8", "c4", "f8c0", "f2c4", "f12c4", "f128c4", "f8c4x", " f8c4", "f-8c4", "F8C4"])
def test_names_that_are_none_are_refused_with_an_example(name):
    with pytest.raises(ValueError, match="such as f8c4"):
        parse_encoder_name(name)


@pytest.mark.parametrize("stride", [4, 8, 16, 32, 64])
def test_the_posterior_has_a_mean_and_a_log_variance_a_channel_on_the_latent_grid(stride):
    encoder = Encoder(stride, z_dim=5, width=8)
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, stride, 2 * stride)).shape == (1, 10, 1, 2)


def test_downsampling_pads_on_the_right_and_the_bottom_only():
    downsample = EncoderDownsample(1)
    x = torch.arange(16.0).view(1, 1, 4, 4)

    def sees(row: int, column: int) -> torch.Tensor:
        with torch.no_grad():
            downsample.conv.bias.zero_()
            downsample.conv.weight.zero_()[0, 0, row, column] = 1
            return downsample(x)[0, 0]

    assert sees(0, 0).tolist() == [[0, 2], [8, 10]]
    assert sees(1, 1).tolist() == [[5, 7], [13, 15]]
    assert sees(2, 2).tolist() == [[10, 0], [0, 0]]


def test_attention_is_the_softmax_over_all_positions_beside_a_shortcut():
    torch.manual_seed(0)
    attention = EncoderAttention(8, groups=2).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    h = attention.norm(x)
    q, k, v = (conv(h).flatten(2) for conv in (attention.q, attention.k, attention.v))  # [B, C, N]
    weights = torch.einsum("bcn,bcm->bnm", q, k).div(8**0.5).softmax(-1)
    expected = x + attention.proj_out(torch.einsum("bnm,bcm->bcn", weights, v).view_as(x))
    assert (attention(x) - expected).abs().max() < 1e-6  # the norm's statistics are float32


def test_the_published_widths_keep_32_groups_and_narrow_ones_four_channels_a_group():
    for width, groups in ((8, 2), (32, 8), (64, 32), (128, 32)):
        with torch.device("meta"):
            encoder = Encoder(8, 4, width)
        assert {m.num_groups for m in encoder.modules() if isinstance(m, GroupNorm)} == {groups}


@pytest.mark.parametrize("posterior_std", [1.0, 0.05])
def test_a_narrow_encoder_to_be_trained_passes_a_signal_and_starts_with_the_asked_deviation(posterior_std):
    torch.manual_seed(0)
    encoder = Encoder(8, z_dim=2, width=8)
    encoder.initialise(posterior_std)
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, logvar = encoder(x).chunk(2, dim=1)
    assert mean.std(dim=0).mean() > 0.05  # images are told apart
    assert encoder.out_proj.bias[2:].tolist() == pytest.approx([2 * math.log(posterior_std)] * 2)
    assert logvar.isfinite().all()
    assert encoder.conv_in.bias.eq(0).all()


def test_a_row_of_the_posterior_depends_on_its_image_alone(tokenizer):
    x = torch.rand(3, 3, 24, 16) * 2 - 1
    with torch.no_grad():
        together = tokenizer.encode(x).parameters
        alone = torch.cat([tokenizer.encode(x[i : i + 1]).parameters for i in range(3)])
    assert (together - alone).abs().max() < 1e-5


def test_the_posterior_is_float32_also_from_half_precision_weights():
    model = SSDD({"name": "f8c2", "width": 8}, "XXS").to(torch.bfloat16)
    assert model.encode(torch.zeros(1, 3, 16, 16)).parameters.dtype == torch.float32
