"""The best rates that the machine reaches now: the ceilings that networks are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from bench.settings import DTYPES
from ssdd.engine.throughput import matmul_flops, seconds_a_call

CALLS = 12  # of which the shortest counts
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
BATCH = {"cpu": 1, "cuda": 64}
CONVOLUTIONS = {"conv": (256, 64), "thin_conv": (64, 256)}
"""Channels and sides of 3x3 convolutions: one in which arithmetic dominates, and the lone call of a first level, where
writing the output to fresh pages costs about as much."""


def ceilings(device: torch.device, dtype: str) -> dict[str, float]:
    """FLOP per second, best of several: `matmul`, and `conv` and `thin_conv`, 3x3 in channels_last."""
    kind = device.type
    found = {"matmul": matmul_flops(device, DTYPES[dtype], MATRIX_SIDE[kind], CALLS)}
    for name, (channels, side) in CONVOLUTIONS.items():
        layout = {"dtype": DTYPES[dtype], "memory_format": torch.channels_last}
        x = torch.randn(BATCH[kind], channels, side, side, device=device).to(**layout)
        weight = torch.randn(channels, channels, 3, 3, device=device).to(**layout)
        seconds = seconds_a_call(device, partial(F.conv2d, x, weight, padding=1), CALLS)
        found[name] = 2 * 9 * channels**2 * side**2 * BATCH[kind] / seconds
    return found


def measure_ceilings(device: torch.device, dtypes: Sequence[str]) -> dict[str, dict[str, float]]:
    """`ceilings` of each dtype, printed as they are found."""
    found = {}
    for dtype in dtypes:
        found[dtype] = ceilings(device, dtype)
        convolutions = [
            f"3x3 convolution of {c} channels at {s} px {found[dtype][n] / 1e9:.0f}"
            for n, (c, s) in CONVOLUTIONS.items()
        ]
        print(
            f"{dtype} ceilings, GFLOP/s: matrix product {found[dtype]['matmul'] / 1e9:.0f}, {', '.join(convolutions)}",
            flush=True,
        )
    return found
