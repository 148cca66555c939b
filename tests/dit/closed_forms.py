"""Distributions whose velocity fields have closed forms, computed in float64, for tests of solvers and guidance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Gaussian:
    """x ~ N(mean, diag(std^2)), both [D]. With x_t = (1 - t) x + t eps, x_t ~ N((1 - t) mean, var_t) where
    var_t = (1 - t)^2 std^2 + t^2, and the ODE leads each point along its standardised coordinate."""

    mean: Tensor
    std: Tensor

    def variance(self, t: Tensor | float) -> Tensor:
        return (1 - t) ** 2 * self.std**2 + t**2

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """v = E[x - eps | x_t] = mean + ((1 - t) std^2 - t) / var_t (x_t - (1 - t) mean)."""
        t = t.double().reshape(-1, 1)
        gain = ((1 - t) * self.std**2 - t) / self.variance(t)
        return self.mean + gain * (x_t.double() - (1 - t) * self.mean)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the data."""
        return self.mean, self.std.square().diag()

    def transport(self, x: Tensor, start: float, end: float) -> Tensor:
        """Where the ODE takes x from time `start` to time `end`."""
        ratio = (self.variance(end) / self.variance(start)).sqrt()
        return (1 - end) * self.mean + ratio * (x.double() - (1 - start) * self.mean)


@dataclass
class Mixture:
    """Components of weights [K], means [K, D] and one standard deviation."""

    weights: Tensor
    means: Tensor
    std: float

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the data."""
        mean = self.weights @ self.means
        between = (self.weights[:, None] * self.means).T @ self.means - mean.outer(mean)
        return mean, between + self.std**2 * torch.eye(len(mean), dtype=mean.dtype)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of the components' velocities under their posterior given x_t."""
        t = t.double().reshape(-1, 1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        offset = x_t.double().unsqueeze(1) - (1 - t) * self.means  # [B, K, D]
        logits = self.weights.log() - offset.square().sum(-1) / (2 * variance.squeeze(-1))
        velocities = self.means + ((1 - t) * self.std**2 - t) / variance * offset
        return (logits.softmax(dim=1).unsqueeze(-1) * velocities).sum(1)


GAUSSIAN = Gaussian(torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64))
MIXTURE = Mixture(
    torch.tensor([0.3, 0.7], dtype=torch.float64),
    torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=torch.float64),
    0.4,
)
