"""KID: the kernel distance between two sets of features (Binkowski et al. 2018), in float64.

Two estimators. `kernel_distance` is the unbiased one over all pairs, and `kernel_bootstrap` gives its uncertainty;
`kernel_distance_of_subsets` is the usual estimate in papers: torch-fidelity's mean over random subsets of 1000 images.
Both estimate the same number; the second one varies with the subsets that its seed draws, and its deviation is that of
subsets of 1000 images, not that of the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssdd.engine.random import seed_of

ROWS = 2048  # rows of a kernel matrix that are in memory at a time


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID: unbiased squared MMD with the kernel (x.y / dim + 1)^3 over all pairs (Binkowski et al. 2018).

    x: features [n, dim], y: features [m, dim], n and m at least 2. May be slightly negative for equal distributions.
    """
    ones_x, ones_y = torch.ones(1, len(x)), torch.ones(1, len(y))
    return (_within(x, ones_x) + _within(y, ones_y) - 2 * _between(x, ones_x, y, ones_y)).item()


def kernel_distance_of_subsets(
    x: Tensor, y: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and deviation (divided by `subsets`) of the KIDs of random subsets of both sets, torch-fidelity's estimator.

    x: features [n, dim], y: features [m, dim]. Subsets are drawn without replacement, x's before y's, from one NumPy
    RandomState(seed), as torch-fidelity 0.4 does: equal features in equal order give its figures.
    ValueError when a set has fewer than `subset_size` images.
    """
    if min(len(x), len(y)) < subset_size:
        raise ValueError(f"KID over subsets of {subset_size} images needs as many in both sets: {len(x)} and {len(y)}")
    draw = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        of_x, of_y = (torch.from_numpy(draw.choice(len(s), subset_size, replace=False)) for s in (x, y))
        distances.append(kernel_distance(x[of_x.to(x.device)], y[of_y.to(y.device)]))
    return float(np.mean(distances)), float(np.std(distances))


@dataclass(frozen=True)
class KernelEstimate:
    """A KID with its uncertainty from resampling the images.

    value: KID of the sets as they are; low, high: 95 % interval; deviation: standard deviation; resampled: float64 [R].
    Subtract `resampled` of two estimates from one `kernel_bootstrap` call to compare them paired.
    """

    value: float
    low: float
    high: float
    deviation: float
    resampled: np.ndarray


def kernel_bootstrap(
    sets: Mapping[str, Tensor], reference: Tensor, resamples: int = 200, seed: int = 0
) -> dict[str, KernelEstimate]:
    """KID of each of several sets against one reference, with a bootstrap over images.

    sets: name -> features [n, dim]; reference: features [m, dim]. A resample draws images with replacement and weighs
    each pair of *different* images by how often both were drawn: a weighted U-statistic, so that an image drawn twice
    is not compared with itself. All sets of equal n share their draws, and all share those of the reference, so that
    decoders of the same latents are compared paired.
    """
    once = torch.ones(1, len(reference))
    weights_y = torch.cat([once, _resample_counts(len(reference), resamples, seed, "reference")])
    within_y = _within(reference, weights_y)
    estimates = {}
    for name, x in sets.items():
        weights_x = torch.cat([torch.ones(1, len(x)), _resample_counts(len(x), resamples, seed, "set")])
        between = _between(x, weights_x, reference, weights_y)
        value, *resampled = (_within(x, weights_x) + within_y - 2 * between).tolist()
        low, high = np.percentile(resampled, [2.5, 97.5]).tolist()
        estimates[name] = KernelEstimate(value, low, high, float(np.std(resampled, ddof=1)), np.array(resampled))
    return estimates


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean kernel of pairs of different rows of x [n, dim], for each row of weights [R, n]: float64 [R]."""
    if len(x) < 2:
        raise ValueError(f"KID needs at least 2 images, got {len(x)}")
    x, weights = x.double(), weights.to(x.device, torch.float64)
    total = torch.zeros(len(weights), dtype=torch.float64, device=x.device)
    for block, own in zip(x.split(ROWS), weights.split(ROWS, dim=1), strict=True):
        total += (own * (weights @ _kernel(x, block))).sum(dim=1)
    itself = (x.square().mean(dim=1) + 1) ** 3
    squares = weights.square()
    return ((total - squares @ itself) / (weights.sum(dim=1).square() - squares.sum(dim=1))).cpu()


def _between(x: Tensor, weights_x: Tensor, y: Tensor, weights_y: Tensor) -> Tensor:
    """Weighted mean kernel of pairs of a row of x and a row of y, for each row of the weights: float64 [R]."""
    x, y = x.double(), y.to(x.device, torch.float64)
    weights_x, weights_y = weights_x.to(x.device, torch.float64), weights_y.to(x.device, torch.float64)
    total = torch.zeros(len(weights_x), dtype=torch.float64, device=x.device)
    for block, own in zip(x.split(ROWS), weights_x.split(ROWS, dim=1), strict=True):
        total += (own * (weights_y @ _kernel(y, block))).sum(dim=1)
    return (total / (weights_x.sum(dim=1) * weights_y.sum(dim=1))).cpu()


def _resample_counts(n: int, resamples: int, seed: int, role: str) -> Tensor:
    """How often each of n images is in a bootstrap resample: float64 [resamples, n], a function of the arguments."""
    generator = torch.Generator().manual_seed(seed_of("kernel bootstrap", role, n, seed))
    draws = torch.randint(n, (resamples, n), generator=generator)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())
