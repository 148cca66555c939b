"""The linear base in closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssdd.engine.errors import UserError
from ssdd.model.linear_base import fit_linear_base


def test_a_linear_code_is_found_again():
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 6), torch.randn(48)
    z = torch.randn(8, 6, 5, 7) * 3 + 1
    x = F.pixel_shuffle(torch.einsum("oc,bchw->bohw", weight, z) + bias[:, None, None], 4)
    found = fit_linear_base([(z[:3], x[:3]), (z[3:], x[3:])], ridge=1e-10)
    torch.testing.assert_close(found[0], weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], bias, rtol=1e-4, atol=1e-4)


def test_it_is_least_squares_and_batches_do_not_matter():
    torch.manual_seed(1)
    z, x = torch.randn(16, 3, 4, 4), torch.randn(16, 3, 8, 8)
    weight, bias = fit_linear_base([(z, x)], ridge=0.0)
    inputs = torch.cat([z.movedim(1, -1).flatten(0, -2), torch.ones(256, 1)], dim=1)
    patches = F.pixel_unshuffle(x, 2).movedim(1, -1).flatten(0, -2)
    expected = torch.linalg.lstsq(inputs.double(), patches.double()).solution.T.float()
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), expected, rtol=1e-4, atol=1e-5)
    parts = fit_linear_base(zip(z.split(5), x.split(5), strict=True), ridge=0.0)
    torch.testing.assert_close(parts[0], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("constant", [0, 1, 1000])
def test_channels_without_variance_get_no_weight(constant):
    z, x = torch.full((4, 2, 2, 2), float(constant)), torch.rand(4, 3, 4, 4)
    weight, bias = fit_linear_base([(z, x)])
    torch.testing.assert_close(weight, torch.zeros_like(weight), rtol=0, atol=1e-3)
    mean = F.pixel_unshuffle(x, 2).mean((0, 2, 3))
    torch.testing.assert_close(weight.sum(dim=1) * constant + bias, mean, rtol=1e-4, atol=1e-4)


def test_no_image_is_an_error():
    with pytest.raises(UserError, match="at least one image"):
        fit_linear_base([])
