"""Group norm: float32 inside whatever the dtype, and the same operator in compiled code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssdd.model.norms import group_norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_the_operators_of_compiled_code_keep_torch_rules(layout, affine):
    x = torch.randn(2, 12, 5, 3).to(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(12, requires_grad=True) if affine else None for _ in range(2))
    torch.library.opcheck(torch.ops.ssdd.group_norm, (x, weight, bias, 4, 1e-5))
    x, weight, bias = (None if p is None else p.detach() for p in (x, weight, bias))
    y, mean, rstd = torch.ops.ssdd.group_norm(x, weight, bias, 4, 1e-5)
    torch.library.opcheck(torch.ops.ssdd.group_norm_backward, (torch.randn_like(y), x, mean, rstd, weight, 4))


@pytest.mark.parametrize("affine", [True, False])
def test_compiled_values_and_gradients_equal_those_of_the_definition(affine):
    x = torch.randn(2, 12, 5, 3).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(12, requires_grad=True) if affine else None for _ in range(2))
    inputs = [x, weight, bias] if affine else [x]
    y = torch.compile(group_norm, fullgraph=True)(x, 4, weight, bias)
    groups = x.unflatten(1, (4, 3))
    deviation = groups.var((2, 3, 4), keepdim=True, correction=0).add(1e-5).sqrt()
    expected = ((groups - groups.mean((2, 3, 4), keepdim=True)) / deviation).flatten(1, 2)
    if affine:
        expected = expected * weight[:, None, None] + bias[:, None, None]
    assert (y - expected).abs().max() < 1e-5
    direction = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((out * direction).sum(), inputs) for out in (y, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_the_operator_takes_any_batch_without_being_compiled_again():
    graphs = []
    run = torch.compile(
        lambda x: group_norm(x, 4), backend=lambda graph, _: graphs.append(graph) or graph, dynamic=True
    )
    for batch in (2, 3, 5):
        x = torch.randn(batch, 12, 4, 4)
        assert torch.allclose(run(x), F.group_norm(x, 4), atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16_is_rounded_once_after_arithmetic_in_float32(affine, way, layout):
    torch.manual_seed(0)
    x = (10 + torch.randn(2, 12, 50, 30)).bfloat16().to(memory_format=layout)  # a mean that bfloat16 sums would lose
    weight, bias = (torch.randn(12) if affine else None for _ in range(2))
    expected = F.group_norm(x.double(), 4, *(None if p is None else p.double() for p in (weight, bias)))
    if way == "weights" and affine:
        weight, bias = weight.bfloat16(), bias.bfloat16()
        expected = F.group_norm(x.double(), 4, weight.double(), bias.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        y = group_norm(x, 4, weight, bias)
    assert y.dtype == torch.bfloat16
    assert ((y - expected).abs() <= 2**-8 * expected.abs() + 5e-3).all()
