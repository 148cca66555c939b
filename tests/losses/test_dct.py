"""The frequency-weighted error: transform, tables, weights."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from ssdd.losses.dct import CHROMA, LUMA, QUALITY, RGB_TO_YCBCR, dct_error, dct_matrix, frequency_weights


def test_the_transform_is_scipy_s():
    block = torch.randn(8, 8, dtype=torch.float64)
    ours = dct_matrix() @ block @ dct_matrix().T
    np.testing.assert_allclose(ours, dctn(block.numpy(), norm="ortho"), atol=1e-12)


def test_the_tables_are_those_that_pillow_writes():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "jpeg", quality=QUALITY)
    written = Image.open(file).quantization  # zigzag undone by Pillow
    for table, ours in ((written[0], LUMA), (written[1], CHROMA)):
        scaled = [max(1, (value * (200 - 2 * QUALITY) + 50) // 100) for row in ours for value in row]
        assert list(table) == scaled


def test_a_flat_grey_residual_has_only_the_weight_of_its_mean():
    residual = torch.full((2, 3, 16, 24), 0.25)
    # Y of a grey is its value, its DC coefficient 8 times that; 1 of 64 coefficients of 1 of 3 channels
    expected = frequency_weights()[0, 0, 0] * (8 * 0.25) ** 2 / (3 * 64)
    torch.testing.assert_close(dct_error(residual), expected.float(), rtol=1e-5, atol=1e-6)


def test_with_equal_weights_it_would_be_the_squared_error_in_ycbcr(monkeypatch):
    monkeypatch.setattr("ssdd.losses.dct.frequency_weights", lambda: torch.ones(3, 8, 8))
    residual = torch.randn(2, 3, 16, 8)
    ycbcr = torch.einsum("dc,bchw->bdhw", torch.tensor(RGB_TO_YCBCR), residual)
    torch.testing.assert_close(dct_error(residual), ycbcr.square().mean())


def test_autocast_changes_nothing():
    residual = torch.randn(2, 3, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        within = dct_error(residual)
    assert within.dtype == torch.float32 and torch.equal(within, dct_error(residual))


def test_low_frequencies_weigh_more():
    weights = frequency_weights()
    torch.testing.assert_close(weights.mean((1, 2)), torch.ones(3, dtype=torch.float64))
    assert weights[0, 0, 0] > 5 * weights[0, 7, 7]


def test_sides_are_checked():
    with pytest.raises(ValueError, match="multiples of 8, got 12x16"):
        dct_error(torch.zeros(1, 3, 12, 16))
