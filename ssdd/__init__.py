"""SSDD: an image tokenizer with a single-step diffusion decoder.

`import ssdd` loads nothing; the names below are loaded when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssdd.model.latent import DiagonalGaussian, LatentNorm
    from ssdd.model.tokenizer import SSDD

__all__ = ["SSDD", "DiagonalGaussian", "LatentNorm"]
HOMES = {"SSDD": "ssdd.model.tokenizer", "DiagonalGaussian": "ssdd.model.latent", "LatentNorm": "ssdd.model.latent"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
