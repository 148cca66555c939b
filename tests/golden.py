"""Deterministic weights for the reference cases in tests/data: every tensor is a pure function of its key and shape."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"


def fill_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 tensor of `shape` from numpy's frozen RandomState, seeded with the crc32 of the key."""
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("relative_bias_table"):
        value = 0.5 * noise
    elif len(shape) >= 2:  # linear, conv, embedding: keeps activations near unit scale
        value = noise / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("weight"):  # affine norm scale
        value = 1 + 0.1 * noise
    else:  # bias
        value = 0.1 * noise
    return torch.from_numpy(np.ascontiguousarray(value))


def fill_state_dict(state_dict: dict[str, torch.Tensor], keep: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Filled tensors for every key; those in `keep` stay as they are (DiT's `pos_embed` is a constant)."""
    return {
        key: value if key in keep else fill_tensor(key, tuple(value.shape)).to(value.dtype)
        for key, value in state_dict.items()
    }


def load_case(name: str) -> dict[str, torch.Tensor]:
    """The inputs (`in.*`) and outputs (`out.*`) of a reference case."""
    return load_file(DATA / f"{name}.safetensors")
