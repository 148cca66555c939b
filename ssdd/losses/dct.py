"""Squared error weighted by what JPEG keeps of each spatial frequency (DeCo, arXiv 2511.19365)."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

BLOCK = 8
QUALITY = 85
# Quantisation tables of ITU T.81, annex K.1 and K.2.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
RGB_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def dct_error(residual: Tensor) -> Tensor:
    """Weighted mean square of the DCT of a residual [B, 3, H, W] in RGB, float32 scalar; 8 divides H and W.

    Taken in YCbCr over blocks of 8x8 pixels, orthonormal. A coefficient's weight is the inverse of its entry in JPEG's
    table of quality 85, the inverses of a table having mean 1. Autocast is off within. ValueError for other sides.
    """
    if residual.shape[-2] % BLOCK or residual.shape[-1] % BLOCK:
        raise ValueError(f"image sides must be multiples of {BLOCK}, got {residual.shape[-2]}x{residual.shape[-1]}")
    with torch.autocast(residual.device.type, enabled=False):
        residual = residual.float()
        ycbcr = torch.einsum("dc,bchw->bdhw", residual.new_tensor(RGB_TO_YCBCR), residual)
        blocks = rearrange(ycbcr, "b c (h y) (w x) -> b h w c y x", y=BLOCK, x=BLOCK)
        matrix = dct_matrix().to(residual)
        return ((matrix @ blocks @ matrix.T).square() * frequency_weights().to(residual)).mean()


def dct_matrix() -> Tensor:
    """The orthonormal DCT-II of 8 values, float64 [frequency, position]."""
    index = torch.arange(BLOCK, dtype=torch.float64)
    matrix = (math.pi / BLOCK * torch.outer(index, index + 0.5)).cos() * (2 / BLOCK) ** 0.5
    matrix[0] *= 0.5**0.5
    return matrix


def frequency_weights() -> Tensor:
    """Weights of the coefficients of Y, Cb and Cr, float64 [3, 8, 8], each table's mean 1."""
    tables = torch.tensor([LUMA, CHROMA, CHROMA], dtype=torch.float64)
    scale = 200 - 2 * QUALITY  # of libjpeg, in percent, for qualities of 50 and above
    inverse = 1 / ((tables * scale + 50) / 100).floor().clamp(min=1)
    return inverse / inverse.mean((1, 2), keepdim=True)
