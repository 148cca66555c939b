"""SSDD: an image tokenizer with a single-step diffusion decoder."""

from ssdd.latent import DiagonalGaussian, LatentNorm
from ssdd.tokenizer import SSDD

__all__ = ["SSDD", "DiagonalGaussian", "LatentNorm"]
