"""SSDD under the interfaces of diffusers' AutoencoderKL and of LightningDiT's tokenizer."""

from ssdd.adapters.autoencoder import AutoencoderSSDD
from ssdd.adapters.lightningdit import LightningDiTTokenizer

__all__ = ["AutoencoderSSDD", "LightningDiTTokenizer"]
