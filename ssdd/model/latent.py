"""The latent: the encoder's diagonal Gaussian posterior, and its normalisation for generators with `z_stats.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, write_json

UNKNOWN_ENCODER = "unknown"
"""Fingerprint in the statistics of latents whose encoder is unknown."""


class DiagonalGaussian:
    """Posterior q(z | x) with independent components; made from `parameters` [B, 2C, h, w] = mean | log variance.

    The log variance is clamped to [-30, 20] (LDM). There is no scaling factor on z.
    """

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)  # [B, C, h, w] each
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The most likely latent, equal to the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + std eps; eps is `noise` if given, else drawn from `generator` on the generator's device."""
        if noise is None:
            device = generator.device if generator is not None else self.mean.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) in nats, summed over c, h, w: [B]."""
        return 0.5 * (self.mean**2 + self.var - 1 - self.logvar).flatten(1).sum(1)


@dataclass
class LatentNorm:
    """z_n = (z - mean) / std, the only place where raw latents become a generator's and back.

    `mean` and `std` are per channel, float32 [C]; `z_mean` and `z_std` are the scalars over all channels. `fingerprint`
    names the encoder weights that the statistics belong to.
    """

    mean: Tensor
    std: Tensor
    z_mean: float
    z_std: float
    count: int
    fingerprint: str

    @classmethod
    def from_moments(cls, mean: Tensor, var: Tensor, count: int, fingerprint: str) -> LatentNorm:
        """From float64 per-channel mean and population variance [C]; every channel has as many values as the others."""
        z_mean = mean.mean()
        z_var = var.mean() + ((mean - z_mean) ** 2).mean()
        return cls(mean.float(), var.sqrt().float(), float(z_mean), float(z_var.sqrt()), count, fingerprint)

    @classmethod
    def identity(cls, channels: int, fingerprint: str = "") -> LatentNorm:
        """The norm that changes nothing."""
        return cls(torch.zeros(channels), torch.ones(channels), 0.0, 1.0, 0, fingerprint)

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float]) -> LatentNorm:
        """From the numbers of every channel alone, of no known encoder."""
        moments = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64).square()
        scalars = cls.from_moments(*moments, 0, "")
        return replace(scalars, mean=torch.tensor(mean), std=torch.tensor(std))

    def scalar(self) -> LatentNorm:
        """The same statistics with one mean and deviation for all channels."""
        mean, std = torch.full_like(self.mean, self.z_mean), torch.full_like(self.std, self.z_std)
        return replace(self, mean=mean, std=std)

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latent [B, C, h, w] -> normalised latent, float32."""
        mean, std = self._like(z)
        return (z.float() - mean) / std

    def denormalise(self, z_n: Tensor) -> Tensor:
        """Normalised latent [B, C, h, w] -> raw latent, float32."""
        mean, std = self._like(z_n)
        return z_n.float() * std + mean

    def _like(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.shape[1] != len(self.mean):
            raise ValueError(f"latent has {z.shape[1]} channels, the statistics have {len(self.mean)}")
        return self.mean.to(z.device).view(-1, 1, 1), self.std.to(z.device).view(-1, 1, 1)

    def save(self, path: str | Path) -> None:
        """Write z_stats.json (atomically)."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict:
        """The content of z_stats.json."""
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "z_mean": self.z_mean,
            "z_std": self.z_std,
            "count": self.count,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def load(cls, path: str | Path, fingerprint: str | None = None) -> LatentNorm:
        """Read z_stats.json. UserError if it belongs to other encoder weights than `fingerprint`."""
        stats = read_json(path)
        missing = {"mean", "std", "z_mean", "z_std", "count", "fingerprint"} - set(
            stats if isinstance(stats, dict) else ()
        )
        if missing:
            raise UserError(f"{path} is not a latent statistics file: it lacks {', '.join(sorted(missing))}")
        mean, std = torch.tensor(stats["mean"]), torch.tensor(stats["std"])
        norm = cls(mean, std, stats["z_mean"], stats["z_std"], stats["count"], stats["fingerprint"])
        if fingerprint is not None:
            norm.check_encoder(fingerprint, path)
        return norm

    def check_encoder(self, fingerprint: str, where: str | Path) -> None:
        """UserError that names `where` unless the statistics are those of the encoder with this fingerprint."""
        if self.fingerprint == UNKNOWN_ENCODER != fingerprint:
            raise UserError(
                f"{where} does not record which encoder its latents come from, so they cannot be decoded: import "
                "the cache again with tokenizer=REFERENCE (or fingerprint=) if you know it"
            )
        if self.fingerprint != fingerprint:
            raise UserError(
                f"{where} holds the statistics of another encoder (weights {self.fingerprint[:12]}, "
                f"this encoder {fingerprint[:12]}): make them again with task=z_stats, or load their own encoder"
            )
