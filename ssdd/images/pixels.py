"""Between image tensors in [-1, 1] and 8-bit pixels, and sheets of images.

These are the only conversions of the project: every metric, picture and file goes through `to_uint8`, so that no two
figures differ by half a grey level (truncating instead of rounding darkens by that much).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PEAK = 255
"""The largest level of an 8-bit pixel."""
ROUNDING = f"clamp to [-1, 1], scale to 0..{PEAK}, round"
"""What `to_uint8` does, as results record it."""


def to_uint8(images: Tensor) -> Tensor:
    """Clamp, scale and round images in [-1, 1] (any float dtype, any shape) to uint8 in [0, 255]."""
    return images.float().clamp(-1, 1).add_(1).mul_(PEAK / 2).round_().to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """Map uint8 pixels in [0, 255] to float32 in [-1, 1]; `to_uint8` brings back the same pixels."""
    return pixels.float() / (PEAK / 2) - 1


def to_unit(levels: Tensor) -> Tensor:
    """Map levels in [0, 255], of any float dtype, to [0, 1]."""
    return levels / PEAK


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """Lay images out in rows of `columns` on white.

    images: uint8 [N, C, H, W] with C = 1 or 3; scale: whole-number enlargement without smoothing;
    gap: white pixels between neighbours. Returns uint8 [height, width, 3].
    """
    pixels = images.detach().cpu().expand(-1, 3, -1, -1).numpy()  # [N, 3, H, W]
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)
    count, _, height, width = pixels.shape
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), PEAK, dtype=np.uint8)
    for place, picture in enumerate(pixels):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture.transpose(1, 2, 0)
    return sheet
