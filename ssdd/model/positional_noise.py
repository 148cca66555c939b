"""Standard normal noise as a function of the seed, the pixel and the channel: a part of an image draws what the whole
does. The random words are those of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"), which needs no state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random words of 32 bits for each counter of four, all int64 tensors that broadcast, and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of word times factor; the product's 64 bits wrap into the sign, which is cut off."""
    product = word * factor
    return product >> 32 & LOW, product & LOW


def positional_noise(
    seed: int, rows: range, columns: range, index: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Noise float32 [3, len(rows), len(columns)] of these pixels of image number `index`; seed below 2^64."""
    y = torch.arange(rows.start, rows.stop, rows.step, device=device).view(-1, 1)
    x = torch.arange(columns.start, columns.stop, columns.step, device=device).view(1, -1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox((y, x, zero + index, zero), (seed & LOW, seed >> 32 & LOW))
    unit = [(word.float() + 0.5) * 2**-32 for word in words]  # in (0, 1]
    radius = [(-2 * u.log()).sqrt() for u in unit[::2]]  # Box and Muller 1958
    angle = [2 * math.pi * u for u in unit[1::2]]
    return torch.stack([radius[0] * angle[0].cos(), radius[0] * angle[0].sin(), radius[1] * angle[1].cos()])
