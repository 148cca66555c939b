"""Random draws that depend on what they are for, never on batch size, process count or what was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A stable 63-bit seed from a tuple of names and numbers, e.g. `seed_of(seed, "noise", step)`."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batch_generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """Generator on `device` seeded with `seed_of(*parts)`.

    Training draws for the whole global batch from one such generator per step, and every process keeps its own rows, so
    that a run does not depend on the number of processes.
    """
    return torch.Generator(device=device).manual_seed(seed_of(*parts))


def indexed_noise(
    indices: Sequence[int] | Tensor, shape: Sequence[int], seed: int, stream: str = "noise"
) -> Tensor:  # [n, *shape]
    """Standard normal float32 noise on the CPU, one generator per sample index.

    Row i depends on `(seed, stream, indices[i])` alone: evaluation and sampling give the same figures for any batch
    size and number of processes.
    """
    rows = [torch.randn(tuple(shape), generator=batch_generator("cpu", seed, stream, int(index))) for index in indices]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def random_state(*parts: int | str) -> np.random.RandomState:
    """A NumPy stream named by `parts`; RandomState, because NumPy promises never to change what it draws."""
    seed = seed_of(*parts)
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
