"""Exact per-channel statistics of latents for `z_stats.json`, in float64, merged in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ssdd.model.latent import LatentNorm


@dataclass
class ChannelStatistics:
    """Mean, squared deviation and posterior variance of C channels over `images` latents, `values` numbers per channel.

    Everything but the counts is float64 [C]: `mean` of the posterior means, `squares` = sum of (mean - `mean`)^2, and
    `noise` = sum of sigma^2 (0 where only means are stored). Merging follows Chan, Golub and LeVeque (1983).
    """

    images: int
    values: int
    mean: np.ndarray
    squares: np.ndarray
    noise: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, content: str = "mean") -> ChannelStatistics:
        """Statistics of raw rows float32 [n, K, h, w]: K = C means, or with content=moments 2C, means and logvars."""
        channels = rows.shape[1] // 2 if content == "moments" else rows.shape[1]
        flat = rows.transpose(1, 0, 2, 3).reshape(rows.shape[1], -1).astype(np.float64)  # [K, n h w]
        means, logvars = flat[:channels], flat[channels:]
        mean = means.mean(1)
        noise = np.exp(logvars).sum(1) if content == "moments" else np.zeros(channels)
        return cls(len(rows), flat.shape[1], mean, ((means - mean[:, None]) ** 2).sum(1), noise)

    def __add__(self, other: ChannelStatistics) -> ChannelStatistics:
        values = self.values + other.values
        gap = other.mean - self.mean
        return ChannelStatistics(
            self.images + other.images,
            values,
            self.mean + gap * (other.values / values),
            self.squares + other.squares + gap**2 * (self.values * other.values / values),
            self.noise + other.noise,
        )

    @classmethod
    def merged(cls, parts: Iterable[ChannelStatistics]) -> ChannelStatistics:
        """The sum of `parts`, in their order."""
        total, *rest = parts
        for part in rest:
            total = total + part
        return total

    def norm(self, fingerprint: str) -> LatentNorm:
        """What makes the stored latent, or with posterior variances the sampled one, have mean 0 and variance 1."""
        var = (self.squares + self.noise) / self.values
        return LatentNorm.from_moments(torch.from_numpy(self.mean), torch.from_numpy(var), self.images, fingerprint)

    def to_dict(self) -> dict:
        """JSON form; floats survive it exactly."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, stored: dict) -> ChannelStatistics:
        arrays = {name: np.array(stored[name], dtype=np.float64) for name in ("mean", "squares", "noise")}
        return cls(stored["images"], stored["values"], **arrays)
