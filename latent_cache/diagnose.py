"""Diagnosis of a cache: what the stored latents show about how well a generator will learn them.

All figures are of the latent that a generator sees: normalised, and with content=moments *sampled*, z = mu + sigma eps.
The noise is never drawn: expectations over it are taken in closed form, so equal caches give equal figures. Only
`largest` is that of the posterior means.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from latent_cache.config import StatsConfig
from latent_cache.diagnosis_report import warnings_of
from latent_cache.read.dataset import LatentDataset
from latent_cache.read.stored_rows import spread, stored_rows
from ssdd.engine.errors import UserError
from ssdd.model.latent import DiagonalGaussian, LatentNorm

CHUNK = 256
LIMITS = (4.0, 6.0)  # in deviations; a Gaussian exceeds them in 6.3e-5 and 2.0e-9 of all cases


def stats(cfg: StatsConfig) -> dict[str, Any]:
    """The figures of a cache as JSON values, with `warnings`. UserError for a cache or a key that is wrong."""
    if cfg.limit is not None and cfg.limit < 1:
        raise UserError(f"limit={cfg.limit}: expected a positive number of samples, or null for all")
    cache = LatentDataset(cfg.cache, cfg.split)
    indices = spread(len(cache), cfg.limit)
    sums = LatentSums(cache.latent_shape, cache.norm, cache.has_moments)
    with tqdm(total=len(indices), desc="stats", unit="latent", mininterval=1.0) as bar:
        for rows in stored_rows(cache, indices, CHUNK):
            sums.add(torch.from_numpy(rows.values).flatten(0, 1))
            bar.update(len(rows.indices))
    result = {
        "cache": cache.manifest["sha256"],
        "split": cfg.split,
        "samples": len(indices),
        "views": cache.manifest["views"],
        "shape": list(cache.latent_shape),
        "content": cache.manifest["content"],
        **sums.figures(),
    }
    return {**result, "warnings": warnings_of(result)}


class LatentSums:
    """Running sums over latents, float64; `figures` turns them into statistics. shape: (C, h, w) of one latent."""

    def __init__(self, shape: tuple[int, int, int], norm: LatentNorm, has_moments: bool) -> None:
        self.shape, self.norm, self.has_moments = shape, norm, has_moments
        channels, height, width = shape
        self.latents = 0
        self.power = torch.zeros(4, channels, dtype=torch.float64)  # sums of E z, E z^2, E z^3, E z^4
        self.noise = torch.zeros(channels, dtype=torch.float64)  # of sigma^2
        self.kl = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)  # of mu_c mu_d
        self.beyond = torch.zeros(len(LIMITS), channels, dtype=torch.float64)
        self.largest = torch.zeros(channels, dtype=torch.float64)
        self.spectrum = torch.zeros(height, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Stored rows [n, K, h, w], normalised."""
        channels = self.shape[0]
        self.latents += len(rows)
        mu = rows[:, :channels].double()
        if self.has_moments:
            var = DiagonalGaussian(rows.double()).var
            self.kl += self._kl(mu, rows[:, channels:].double())
        else:
            var = torch.zeros_like(mu)
        square, over = mu.square(), (0, 2, 3)
        self.power += torch.stack(  # Gaussian moments about 0 of mu + sigma eps
            [
                mu.sum(over),
                (square + var).sum(over),
                (mu * square + 3 * mu * var).sum(over),
                (square.square() + 6 * square * var + 3 * var.square()).sum(over),
            ]
        )
        self.noise += var.sum(over)
        flat = mu.transpose(0, 1).flatten(1)
        self.products += flat @ flat.T
        self.largest = torch.maximum(self.largest, flat.abs().amax(1))
        self.beyond += torch.stack([self._share_beyond(mu, var, limit).sum(over) for limit in LIMITS])
        transformed = torch.fft.fft2(mu, norm="ortho")
        self.spectrum += transformed.abs().square().sum((0, 1))

    def _kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """KL(q || N(0, I)) in nats of the raw posteriors, summed over all but the channels: [C]."""
        raw_logvar = logvar + 2 * self.norm.std.double().log().view(-1, 1, 1)
        raw = DiagonalGaussian(torch.cat([self.norm.denormalise(mu).double(), raw_logvar], 1))
        return 0.5 * (raw.mean.square() + raw.var - 1 - raw.logvar).sum((0, 2, 3))

    def _share_beyond(self, mu: Tensor, var: Tensor, limit: float) -> Tensor:
        """P(|mu + sigma eps| > limit), elementwise."""
        if not self.has_moments:
            return (mu.abs() > limit).double()
        scale = (2 * var).sqrt()
        return 0.5 * (torch.erfc((limit - mu) / scale) + torch.erfc((limit + mu) / scale))

    def figures(self) -> dict[str, Any]:
        """JSON values; channel lists have length C."""
        channels, height, width = self.shape
        values = self.latents * height * width
        mean, second, third, fourth = self.power / values
        noise = self.noise / values
        var = second - mean.square()
        central4 = fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean.pow(4)
        signal = var - noise
        raw_mean, raw_std = self.norm.mean.double(), self.norm.std.double()
        correlation, pair = self._correlation(mean, var, values)
        result = {
            "channels": {
                "raw_mean": (raw_mean + raw_std * mean).tolist(),
                "raw_std": (raw_std * var.sqrt()).tolist(),
                "mean": mean.tolist(),
                "std": var.sqrt().tolist(),
                "excess_kurtosis": (central4 / var.square() - 3).tolist(),
                **{f"beyond_{limit:.0f}": (n / values).tolist() for limit, n in zip(LIMITS, self.beyond, strict=True)},
                "largest": self.largest.tolist(),
                "signal_std": (raw_std * signal.clamp(min=0).sqrt()).tolist(),
            },
            "largest_correlation": {"r": correlation, "channels": pair},
            "spectrum": self._radial(mean, noise),
        }
        if not self.has_moments:
            return result | {"posterior": None}
        snr = signal.clamp(min=0) / noise
        return result | {
            "posterior": {
                "snr": snr.tolist(),
                "kl_nats": (self.kl / self.latents).tolist(),
                "bits": (height * width * 0.5 * torch.log2(1 + snr)).tolist(),
                "kl_nats_a_latent": float(self.kl.sum() / self.latents),
                "bits_a_latent": float(height * width * 0.5 * torch.log2(1 + snr).sum()),
            }
        }

    def _correlation(self, mean: Tensor, var: Tensor, values: int) -> tuple[float, list[int]]:
        """The largest |r| between two channels at the same position, with its sign, and the two channels."""
        if len(mean) == 1:
            return 0.0, []
        covariance = self.products / values - mean[:, None] * mean  # the noise of two channels is independent
        r = covariance / (var[:, None] * var).sqrt()
        r.fill_diagonal_(0)
        first, second = divmod(int(r.abs().argmax()), len(r))
        return float(r[first, second]), sorted([first, second])

    def _radial(self, mean: Tensor, noise: Tensor) -> dict[str, Any]:
        """Power by radial frequency in cycles per position, the mean over latents and channels, less the channel means.

        share: of all power; density: power per mode over that of white noise. flatness: geometric over arithmetic mean
        of the power of all modes, 1 for white noise (Wiener entropy).
        """
        channels, height, width = self.shape
        power = self.spectrum / (self.latents * channels) + noise.mean()  # the posterior's noise is white
        power[0, 0] -= height * width * mean.square().mean()
        power = power.clamp(min=1e-300)
        fy, fx = (torch.fft.fftfreq(side, dtype=torch.float64).abs() for side in (height, width))
        radius = torch.hypot(fy[:, None], fx[None])
        bins = (radius * max(height, width)).round().long().flatten()
        modes = torch.bincount(bins).double()
        total = torch.zeros_like(modes).index_add(0, bins, power.flatten())
        centre = torch.zeros_like(modes).index_add(0, bins, radius.flatten())
        found = modes > 0
        share = total / total.sum()
        return {
            "frequency": (centre / modes)[found].tolist(),
            "share": share[found].tolist(),
            "density": (share / modes * power.numel())[found].tolist(),
            "flatness": math.exp(float(power.log().mean())) / float(power.mean()),
        }
