"""How a cache is computed: full float32 in a fixed order of summation, which its bytes depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ssdd.engine.precision import Precision


@contextmanager
def exact_arithmetic(device: torch.device, threads: int) -> Iterator[None]:
    """Full float32: `threads` on the CPU, no autotuning and no TF32 on the GPU; what was set before comes back."""
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            Precision.float32(device).autocast(),
        ):
            yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
