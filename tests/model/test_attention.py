"""Tiled window attention equals a plain masked softmax, forward and backward."""

from __future__ import annotations

import pytest
import torch

from ssdd.model.attention import RelativePositionBias, WindowAttention, WindowGeometry


def masked_softmax_attention(attention, table, x, window):
    """The definition, with an N x N mask."""
    height, width = x.shape[1:3]
    y, x_ = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x_ = y.flatten(), x_.flatten()
    dy, dx = y[:, None] - y[None], x_[:, None] - x_[None]
    reach = window - 1
    bias = table[dy.clamp(-reach, reach) + reach, dx.clamp(-reach, reach) + reach].permute(2, 0, 1)
    bias = bias.masked_fill((dy.abs() > reach) | (dx.abs() > reach), float("-inf"))
    q, k, v = (
        linear(x).flatten(1, 2).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for linear in (attention.to_q, attention.to_k, attention.to_v)
    )
    weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(2)).unflatten(1, (height, width))


@pytest.mark.parametrize(("height", "width"), [(4, 6), (9, 17)])
def test_compiled_gradients_equal_eager_ones(height, width):
    torch.manual_seed(0)
    attention, position = WindowAttention(12, 2), RelativePositionBias(8, 2)
    x = torch.randn(2, height, width, 12, requires_grad=True)
    parameters = [x, *attention.parameters(), *position.parameters()]
    geometry = WindowGeometry.of(height, width, 8, x.device)

    def loss(x):
        return attention(x, position(geometry), geometry).square().sum()

    expected = torch.autograd.grad(loss(x), parameters)
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), parameters)
    for ours, reference in zip(found, expected, strict=True):
        assert (ours - reference).abs().max() <= 1e-5 * max(1, reference.abs().max())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (7, 5), (8, 8), (9, 16), (3, 20), (32, 32)])
def test_tiles_equal_the_masked_softmax(height, width):
    torch.manual_seed(0)
    attention, position = WindowAttention(12, 2).double(), RelativePositionBias(8, 2).double()
    torch.nn.init.normal_(position.relative_bias_table)
    x = torch.randn(2, height, width, 12, dtype=torch.float64, requires_grad=True)
    parameters = [x, *attention.parameters(), *position.parameters()]
    geometry = WindowGeometry.of(height, width, 8, x.device)

    tiled = attention(x, position(geometry), geometry)
    plain = masked_softmax_attention(attention, position.relative_bias_table, x, 8)
    assert (tiled - plain).abs().max() <= 1e-10

    weight = torch.randn_like(plain)
    for ours, reference in zip(
        torch.autograd.grad((tiled * weight).sum(), parameters),
        torch.autograd.grad((plain * weight).sum(), parameters),
        strict=True,
    ):
        assert (ours - reference).abs().max() <= 1e-10
