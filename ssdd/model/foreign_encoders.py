"""Frozen networks from elsewhere: autoencoders of diffusers, or an encoder given by the user.

Latents are those that generators trained on such an autoencoder see: shifted, scaled and packed as its pipeline does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd.engine.errors import UserError, first_line
from ssdd.model.latent import DiagonalGaussian

SD_VAE = "stabilityai/sd-vae-ft-mse"
LEAST_LOG_VARIANCE = -30.0  # diffusers' DiagonalGaussianDistribution clamps to it; what stands for no variance


class Border(NamedTuple):
    """From an autoencoder's own latents to those that generators see: `pack` cells a side become channels, then
    (z - shift) * scale.
    """

    stride: int
    """Of the packed latent."""
    channels: int
    shift: float | Tensor = 0.0  # of all channels, or [channels]
    scale: float | Tensor = 1.0
    pack: int = 1
    deterministic: bool = False
    """The encoder gives the latent itself, not mean and log variance."""

    def enter(self, z: Tensor) -> Tensor:
        """Own latent [B, c, h, w], float32, as generators see it."""
        shift, scale = (self._on(number, z) for number in (self.shift, self.scale))
        return (F.pixel_unshuffle(z, self.pack) - shift) * scale

    def leave(self, z: Tensor) -> Tensor:
        """The inverse of `enter`."""
        shift, scale = (self._on(number, z) for number in (self.shift, self.scale))
        return F.pixel_shuffle(z / scale + shift, self.pack)

    def log_scale(self, like: Tensor) -> Tensor | float:
        """log of the scale, for log variances packed like `like`."""
        scale = self._on(self.scale, like)
        return scale.log() if isinstance(scale, Tensor) else math.log(scale)

    def recorded(self) -> bytes:
        """What a fingerprint of latents must contain besides the encoder's weights."""
        if not isinstance(self.scale, Tensor):
            return f"scale {self.scale} shift {self.shift}".encode()
        return b"".join(part.cpu().numpy().tobytes() for part in (self.scale, self.shift))

    @staticmethod
    def _on(number: float | Tensor, like: Tensor) -> float | Tensor:
        return number.to(like.device).view(-1, 1, 1) if isinstance(number, Tensor) else number


def _kl(vae: Any) -> Border:
    """SD 1.x, SDXL, SD 3, FLUX.1: one factor and one shift."""
    config = vae.config
    stride = 2 ** (len(config.block_out_channels) - 1)
    shift = getattr(config, "shift_factor", None) or 0.0
    return Border(stride, config.latent_channels, shift, config.scaling_factor or 1.0)


def _flux2(vae: Any) -> Border:
    """FLUX.2: 2x2 cells are packed, and their channels normalised by the running statistics of `vae.bn`."""
    config, pack = vae.config, vae.config.patch_size[0]
    stride = 2 ** (len(config.block_out_channels) - 1)
    mean, std = vae.bn.running_mean.float(), (vae.bn.running_var.float() + config.batch_norm_eps).sqrt()
    return Border(stride * pack, config.latent_channels * pack**2, mean.clone(), 1 / std, pack)


def _dc(vae: Any) -> Border:
    """DC-AE (SANA): a deterministic latent times one factor."""
    config = vae.config
    stride = 2 ** (len(config.encoder_block_out_channels) - 1)
    return Border(stride, config.latent_channels, 0.0, config.scaling_factor, deterministic=True)


BORDERS: dict[str, Callable[[Any], Border]] = {
    "AutoencoderKL": _kl,
    "AutoencoderKLFlux2": _flux2,
    "AutoencoderDC": _dc,
}
"""Class of diffusers -> its border. All have an `encoder`; some a `quant_conv` after it."""


def _known_class(network: Any) -> str | None:
    """The key of `BORDERS` that a network is an instance of, or of a subclass."""
    return next((kind.__name__ for kind in type(network).__mro__ if kind.__name__ in BORDERS), None)


class ForeignEncoder(nn.Module):
    """The encoder of an autoencoder of diffusers, in the latent space of the generators that were trained on it.

    f: stride; z_dim: latent channels. The encoder is shared and frozen; the rest of the autoencoder stays as it is.
    UserError for a class that is not in `BORDERS`.
    """

    def __init__(self, vae: Any):
        super().__init__()
        if (kind := _known_class(vae)) is None:
            raise UserError(
                f"latents of {type(vae).__name__} are unknown here; known are those of {', '.join(BORDERS)}"
            )
        self.border = BORDERS[kind](vae)
        self.f, self.z_dim = self.border.stride, self.border.channels
        self.encoder, self.quant_conv = vae.encoder, getattr(vae, "quant_conv", None) or nn.Identity()
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str) -> ForeignEncoder:
        """From a folder, or a name in the local Hugging Face cache (fetched if there is a connection).

        UserError if diffusers or the weights are missing.
        """
        return cls(load_autoencoder(path, "encoder"))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] -> [B, 2c, H/f, W/f], mean | log variance."""
        h = self.quant_conv(self.encoder(x)).float()
        if self.border.deterministic:
            mean = self.border.enter(h)
            return torch.cat([mean, torch.full_like(mean, LEAST_LOG_VARIANCE)], dim=1)
        mean, logvar = h.chunk(2, dim=1)
        logvar = F.pixel_unshuffle(logvar.clamp(LEAST_LOG_VARIANCE, 20), self.border.pack)
        return torch.cat([self.border.enter(mean), logvar + 2 * self.border.log_scale(logvar)], dim=1)


class ForeignAutoencoder(nn.Module):
    """A whole autoencoder of diffusers in place of a tokenizer, for comparison: its own encoder and decoder.

    Latents are those of `ForeignEncoder`. Decoding is deterministic: it takes neither noise nor steps.
    """

    deterministic = True

    def __init__(self, vae: Any):
        super().__init__()
        self.encoder, self.vae = ForeignEncoder(vae), vae
        self.config = {"decoder": type(vae).__name__, "fm_sampler": None}
        """As that of a tokenizer, for results."""
        self.f, self.z_dim = self.encoder.f, self.encoder.z_dim
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str) -> ForeignAutoencoder:
        """As `ForeignEncoder.from_pretrained`."""
        return cls(load_autoencoder(path, "decoder"))

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Image [B, 3, H, W] in [-1, 1] -> posterior over z [B, c, H/f, W/f]."""
        return DiagonalGaussian(self.encoder(x))

    @torch.no_grad()
    def decode(self, z: Tensor, steps: int | None = None, noise: Tensor | None = None) -> Tensor:
        """Latent [B, c, h, w] -> image [B, 3, h f, w f], float32, about [-1, 1]; `steps` and `noise` change nothing."""
        return self.vae.decode(self.encoder.border.leave(z)).sample.float()

    def check_image_size(self, height: int, width: int) -> None:
        """UserError unless images of these sides can be encoded and decoded."""
        if height % self.f or width % self.f:
            raise UserError(f"image sides must be multiples of {self.f}, got {height}x{width}")

    def encoder_fingerprint(self) -> str:
        """That of a tokenizer with the same encoder, so that they decode the same latents."""
        return encoder_fingerprint(self.encoder)


def load_autoencoder(path: str, role: str) -> Any:
    """An autoencoder of diffusers, of the class that its config names; role: what an error calls it.

    A pipeline's folder holds it in `vae`. UserError if diffusers or the weights are missing.
    """
    try:
        from diffusers import AutoModel
    except ImportError:
        raise UserError(f"{role} {path!r} needs diffusers; run: pip install diffusers") from None
    pipeline = (Path(path) / "vae" / "config.json").is_file()
    try:
        return AutoModel.from_pretrained(path, subfolder="vae" if pipeline else None)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{role} {path!r}: none of {', '.join(BORDERS)} there ({first_line(error)}). Give a folder with "
            f"config.json and diffusion_pytorch_model.safetensors, or fetch it with `hf download {path}`"
        ) from None


def encoder_fingerprint(encoder: nn.Module) -> str:
    """sha256 of an encoder's float32 weights, and of what a `ForeignEncoder` does to its latents."""
    digest = hashlib.sha256()
    for key, tensor in sorted(encoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.float().contiguous().cpu().numpy().tobytes())
    if isinstance(encoder, ForeignEncoder):
        digest.update(encoder.border.recorded())
    return digest.hexdigest()


def adopt(encoder: nn.Module) -> nn.Module:
    """A user's module as a frozen encoder; an autoencoder of diffusers is wrapped.

    Others map images [B, 3, H, W] in [-1, 1] to mean | log variance [B, 2 z_dim, H/f, W/f] and have the integers f and
    z_dim, else UserError.
    """
    if _known_class(encoder) is not None:
        return ForeignEncoder(encoder)
    if not all(isinstance(getattr(encoder, name, None), int) for name in ("f", "z_dim")):
        raise UserError(f"the encoder module {type(encoder).__name__} must have the integers f (stride) and z_dim")
    return encoder.eval().requires_grad_(False)
