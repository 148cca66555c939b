"""Frozen networks from elsewhere: any diffusers AutoencoderKL, SD-VAE among them, or an encoder given by the user."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from ssdd.engine.errors import UserError, first_line
from ssdd.model.latent import DiagonalGaussian

SD_VAE = "stabilityai/sd-vae-ft-mse"


class KLEncoder(nn.Module):
    """The encoder of a diffusers `AutoencoderKL`, in the latent space of the generators that were trained on it.

    That space is (z - shift_factor) * scaling_factor with the factors of the VAE's config, so what such a generator
    samples can be decoded as it is. f: stride; z_dim: latent channels. The VAE's encoder is shared and frozen; the
    rest of the VAE stays as it is.
    """

    def __init__(self, vae: Any):
        super().__init__()
        config = vae.config
        self.f, self.z_dim = 2 ** (len(config.block_out_channels) - 1), config.latent_channels
        self.scale, self.shift = config.scaling_factor or 1.0, getattr(config, "shift_factor", None) or 0.0
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv or nn.Identity()
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str) -> KLEncoder:
        """From a folder, or a name in the local Hugging Face cache (fetched if there is a connection).

        UserError if diffusers or the weights are missing.
        """
        return cls(load_vae(path, "encoder"))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] -> [B, 2c, H/f, W/f], mean | log variance."""
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)  # diffusers' DiagonalGaussianDistribution
        return torch.cat([(mean - self.shift) * self.scale, logvar + 2 * math.log(self.scale)], dim=1)


class KLVAE(nn.Module):
    """A whole diffusers `AutoencoderKL` in place of a tokenizer, for comparison: its own encoder and decoder.

    Latents are those of `KLEncoder`. Decoding is deterministic: it takes neither noise nor steps.
    """

    deterministic = True
    config = {"decoder": "AutoencoderKL", "fm_sampler": None}
    """As that of a tokenizer, for results."""

    def __init__(self, vae: Any):
        super().__init__()
        self.encoder, self.vae = KLEncoder(vae), vae
        self.f, self.z_dim = self.encoder.f, self.encoder.z_dim
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str) -> KLVAE:
        """As `KLEncoder.from_pretrained`."""
        return cls(load_vae(path, "decoder"))

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Image [B, 3, H, W] in [-1, 1] -> posterior over z [B, c, H/f, W/f]."""
        return DiagonalGaussian(self.encoder(x))

    @torch.no_grad()
    def decode(self, z: Tensor, steps: int | None = None, noise: Tensor | None = None) -> Tensor:
        """Latent [B, c, h, w] -> image [B, 3, h f, w f], float32, about [-1, 1]; `steps` and `noise` change nothing."""
        return self.vae.decode(z / self.encoder.scale + self.encoder.shift).sample.float()

    def check_image_size(self, height: int, width: int) -> None:
        """UserError unless images of these sides can be encoded and decoded."""
        if height % self.f or width % self.f:
            raise UserError(f"image sides must be multiples of {self.f}, got {height}x{width}")

    def encoder_fingerprint(self) -> str:
        """That of a tokenizer with the same encoder, so that they decode the same latents."""
        return encoder_fingerprint(self.encoder)


def load_vae(path: str, role: str) -> Any:
    """A diffusers AutoencoderKL; role: what an error calls it. UserError if diffusers or the weights are missing."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError(f"{role} {path!r} needs diffusers; run: pip install diffusers") from None
    try:
        return AutoencoderKL.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{role} {path!r}: no AutoencoderKL there ({first_line(error)}). Give a folder with "
            f"config.json and diffusion_pytorch_model.safetensors, or fetch it with `hf download {path}`"
        ) from None


def encoder_fingerprint(encoder: nn.Module) -> str:
    """sha256 of an encoder's float32 weights, and of what a `KLEncoder` does to its latents."""
    digest = hashlib.sha256()
    for key, tensor in sorted(encoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.float().contiguous().cpu().numpy().tobytes())
    if isinstance(encoder, KLEncoder):
        digest.update(f"scale {encoder.scale} shift {encoder.shift}".encode())
    return digest.hexdigest()


def adopt(encoder: nn.Module) -> nn.Module:
    """A user's module as a frozen encoder; an AutoencoderKL is wrapped.

    Others map images [B, 3, H, W] in [-1, 1] to mean | log variance [B, 2 z_dim, H/f, W/f] and have the integers f and
    z_dim, else UserError.
    """
    if hasattr(encoder, "encode") and hasattr(getattr(encoder, "config", None), "block_out_channels"):
        return KLEncoder(encoder)
    if not all(isinstance(getattr(encoder, name, None), int) for name in ("f", "z_dim")):
        raise UserError(f"the encoder module {type(encoder).__name__} must have the integers f (stride) and z_dim")
    return encoder.eval().requires_grad_(False)
