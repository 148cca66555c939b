"""Class-conditional diffusion transformers on cached latents: model, guidance, training, sampling, gFID."""

from dit.foreign_checkpoints import export_dit, load_dit
from dit.model import DiT

__all__ = ["DiT", "export_dit", "load_dit"]
