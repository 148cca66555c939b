"""How alike two sets of images are, from their features: Frechet distance, KID, precision, recall, copies.

Everything is float64. Features are collected by `FeatureStatistics`: update, reduce over processes, compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from ssdd.engine.noise import seed_of

ROWS = 2048  # rows of a pairwise matrix that are in memory at a time


@dataclass(frozen=True)
class Statistics:
    """What a set of images looks like to a feature network.

    count: images; mean: float64 [dim]; cov: float64 [dim, dim], divided by count - 1;
    features: float32 [count, dim] sorted by image index, or None when only sums were kept.
    """

    count: int
    mean: Tensor
    cov: Tensor
    features: Tensor | None = None


class FeatureStatistics:
    """Collects the features of a set of images, over batches and processes, each image index once.

    keep_features=True holds the features, so that the outcome does not depend on batches or processes in any bit;
    keep_features=False holds float64 sums only (for sets too large), merged in rank order.
    """

    def __init__(self, dim: int, keep_features: bool = True) -> None:
        self.dim = dim
        self.keep_features = keep_features
        self._reduced = False
        self._seen = torch.empty(0, dtype=torch.int64)  # image indices, one a row of `_features`
        self._features: list[Tensor] = []
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor, indices: Tensor) -> None:
        """Add float features [n, dim] of the images `indices` (int64 [n]); an index added before is left out."""
        if features.ndim != 2 or features.shape != (len(indices), self.dim):
            raise ValueError(f"expected features [{len(indices)}, {self.dim}], got {tuple(features.shape)}")
        if self._reduced:
            raise RuntimeError("update after reduce: the other processes would miss these images")
        indices = indices.detach().cpu().long()
        features = features.detach().cpu().float()
        fresh = _first_places(indices)
        fresh = fresh[~torch.isin(indices[fresh], self._seen)]
        self._seen = torch.cat([self._seen, indices[fresh]])
        features = features[fresh]
        if self.keep_features:
            self._features.append(features)
        else:
            self._sum += features.double().sum(dim=0)
            self._outer += features.double().T @ features.double()

    def reduce(self) -> None:
        """Merge the images of all processes into every process; without torch.distributed nothing happens.

        ValueError when only sums were kept and an image was seen by two processes: it can't be taken out again.
        """
        if self._reduced or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        if self.keep_features:
            features = torch.cat(self._features) if self._features else torch.empty(0, self.dim)
            self._features = [_gather_rows(features)]
        self._seen = _gather_rows(self._seen)
        if not self.keep_features:
            if len(self._seen.unique()) < len(self._seen):
                raise ValueError("two processes have the same image: with keep_features=False it would count twice")
            self._sum = _gather_rows(self._sum[None]).sum(dim=0)
            self._outer = _gather_rows(self._outer[None]).sum(dim=0)
        self._reduced = True

    def compute(self) -> Statistics:
        """Statistics of all images so far. ValueError for fewer than two images or features that are not finite."""
        if not self.keep_features:
            count = len(self._seen)
            _require_two(count)
            mean = self._sum / count
            cov = (self._outer - count * torch.outer(mean, mean)) / (count - 1)
            return _finite(Statistics(count, mean, cov))
        features = torch.cat(self._features) if self._features else torch.empty(0, self.dim)
        features = features[_first_places(self._seen)]  # by index: any order of arrival gives the same bits
        _require_two(len(features))
        exact = features.double()
        mean = exact.mean(dim=0)
        cov = (exact - mean).T @ (exact - mean) / (len(exact) - 1)
        return _finite(Statistics(len(features), mean, cov, features))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + Tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), never negative (Heusel et al. 2017).

    The trace of the root is that of (R cov_b R)^(1/2) with R = cov_a^(1/2), from eigenvalues of symmetric matrices:
    scipy's sqrtm of the product has given wrong figures on several platforms (facts 3.1). Warns when a set has no more
    images than features; then most of the value is bias.
    """
    dim = len(a.mean)
    for statistics in (a, b):
        if statistics.count <= dim:
            warnings.warn(
                f"Frechet distance of {statistics.count} images in {dim} dimensions is mostly bias; look at KID",
                stacklevel=2,
            )
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.cov @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(0.0, distance.item())


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID: unbiased squared MMD with the kernel (x.y / dim + 1)^3 over all pairs (Binkowski et al. 2018).

    x: features [n, dim], y: features [m, dim], n and m at least 2. May be slightly negative for equal distributions.
    """
    ones_x, ones_y = torch.ones(1, len(x)), torch.ones(1, len(y))
    return (_within(x, ones_x) + _within(y, ones_y) - 2 * _between(x, ones_x, y, ones_y)).item()


@dataclass(frozen=True)
class KernelEstimate:
    """A KID with what resampling the images says of its uncertainty.

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


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall (Kynkaanniemi et al. 2019) of features [n, dim] and [m, dim].

    Precision: share of generated images inside a ball around some real image that reaches to its k-th nearest other
    real image; recall: the same with the sets exchanged.
    """
    return _covered(generated, real, k), _covered(real, generated, k)


def copy_rate(generated: Tensor, train: Tensor, heldout: Tensor) -> tuple[float, float]:
    """Shares of generated and of held-out real images that look like copies of a training image; features [*, dim].

    An image counts as a copy when it lies closer to its nearest training image than that one lies to its own nearest
    other training image (authenticity; Alaa et al. 2022). Unseen real images do so at some rate by chance, so only the
    difference between the two shares says anything.
    """
    to_next = torch.cat([_nearest(block, 1)[0] for block in _squared_distances(train, train, exclude_same=True)])

    def rate(images: Tensor) -> float:
        copies = [
            (distance[:, 0] < to_next[place[:, 0], 0])
            for distance, place in (_nearest(block, 1) for block in _squared_distances(images, train))
        ]
        return torch.cat(copies).double().mean().item()

    return rate(generated), rate(heldout)


def _first_places(indices: Tensor) -> Tensor:
    """Where each different index first occurs, in ascending order of the index."""
    ordered, places = torch.sort(indices, stable=True)
    first = torch.ones(len(ordered), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return places[first]


def _gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes, in rank order; each may have another number of them."""
    world = dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=device))
    longest = int(max(counts))
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(count)].cpu() for part, count in zip(gathered, counts, strict=True)])


def _require_two(count: int) -> None:
    if count < 2:
        raise ValueError(f"statistics need at least 2 images, got {count}")


def _finite(statistics: Statistics) -> Statistics:
    if not (statistics.mean.isfinite().all() and statistics.cov.isfinite().all()):
        raise ValueError("features are not finite: the images or the feature network are broken")
    return statistics


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean kernel of pairs of different rows of x [n, dim], for each row of weights [R, n]: float64 [R]."""
    _require_two(len(x))
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


def _squared_distances(x: Tensor, y: Tensor, exclude_same: bool = False) -> Iterator[Tensor]:
    """Squared distances of blocks of rows of x to all rows of y: [<= ROWS, m]; exclude_same: none to a row itself."""
    x, y = x.double(), y.to(x.device, torch.float64)
    lengths = y.square().sum(dim=1)
    for first in range(0, len(x), ROWS):
        block = x[first : first + ROWS]
        distances = block.square().sum(dim=1, keepdim=True) + lengths - 2 * block @ y.T
        if exclude_same:
            distances.diagonal(first).fill_(torch.inf)
        yield distances.clamp(min=0)


def _nearest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, ascending: values [n, k], columns [n, k]."""
    return torch.topk(distances, k, dim=1, largest=False)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of points inside the ball of any centre that reaches to its k-th nearest other centre."""
    if len(centres) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} images, got {len(centres)}")
    others = _squared_distances(centres, centres, exclude_same=True)
    radii = torch.cat([_nearest(block, k)[0][:, -1] for block in others])
    inside = [(block <= radii).any(dim=1) for block in _squared_distances(points, centres)]
    return torch.cat(inside).double().mean().item()
