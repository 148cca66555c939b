"""SSDD behind the faces that other people's code calls: diffusers' AutoencoderKL, and LightningDiT's tokenizer."""

from ssdd.adapters.autoencoder import AutoencoderSSDD
from ssdd.adapters.lightningdit import LightningDiTTokenizer

__all__ = ["AutoencoderSSDD", "LightningDiTTokenizer"]
