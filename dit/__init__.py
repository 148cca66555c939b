"""Class-conditional diffusion transformers on cached latents: model, guidance, training, sampling, gFID."""

from dit.model import DiT

__all__ = ["DiT"]
