"""How alike two sets of images are, from their features: Frechet distance, precision, recall, copies (KID: kid.py).

Everything is float64. Features are collected by `FeatureStatistics`: update, reduce over processes, compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

ROWS = 2048  # rows of a distance matrix that are in memory at a time


@dataclass(frozen=True)
class Statistics:
    """What a set of images looks like to a feature network.

    count: images, None when a foreign file does not say; mean: float64 [dim]; cov: float64 [dim, dim], divided by
    count - 1; features: float32 [count, dim] sorted by image index, or None when only sums were kept;
    spatial: the same of feature maps (sFID), inception_score: (mean, deviation over splits), if the network has them.
    """

    count: int | None
    mean: Tensor
    cov: Tensor
    features: Tensor | None = None
    spatial: Statistics | None = None
    inception_score: tuple[float, float] | None = None


class SeenIndices:
    """The indices of the images that came so far, in order of arrival; a batch takes as long however many there are."""

    def __init__(self) -> None:
        self._parts = [torch.empty(0, dtype=torch.int64)]
        self._has = torch.zeros(0, dtype=torch.bool)

    def add(self, indices: Tensor) -> Tensor:
        """Note indices (int64 [n], not negative); returns the places of those that are new, ascending by index."""
        indices = indices.detach().cpu().long()
        missing = int(indices.max()) + 1 - len(self._has) if len(indices) else 0
        if missing > 0:
            self._has = torch.cat([self._has, torch.zeros(missing + len(self._has), dtype=torch.bool)])
        fresh = first_places(indices)
        fresh = fresh[~self._has[indices[fresh]]]
        self._has[indices[fresh]] = True
        self._parts.append(indices[fresh])
        return fresh

    def all(self) -> Tensor:
        """int64 [n]."""
        self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def reduce(self) -> None:
        """Those of all processes, in rank order; what two of them have is there twice."""
        self._parts = [gather_rows(self.all())]

    def has_doubles(self) -> bool:
        return len(self.all().unique()) < len(self.all())


class FeatureStatistics:
    """Collects the features of a set of images, over batches and processes, each image index once.

    keep_features=True holds the features on the CPU, so that the outcome does not depend on batches or processes in any
    bit; keep_features=False holds float64 moments only (for sets too large), on the features' device where that has
    float64, and the outcome depends on batches and processes by rounding, below 1e-12 of the covariance's largest.
    """

    def __init__(self, dim: int, keep_features: bool = True) -> None:
        self.dim = dim
        self.keep_features = keep_features
        self._reduced = False
        self._seen = SeenIndices()  # one a row of `_features`
        self._features: list[Tensor] = []
        self._moments = _Moments(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    def update(self, features: Tensor, indices: Tensor) -> None:
        """Add float features [n, dim] of the images `indices` (int64 [n]); an index added before is left out."""
        if features.ndim != 2 or features.shape != (len(indices), self.dim):
            raise ValueError(f"expected features [{len(indices)}, {self.dim}], got {tuple(features.shape)}")
        if self._reduced:
            raise RuntimeError("update after reduce: the other processes would miss these images")
        fresh = self._seen.add(indices)
        if not len(fresh):
            return
        features = features.detach().float()[fresh.to(features.device)]
        if self.keep_features:
            self._features.append(features.cpu())
        else:
            self._moments = self._moments.merged(_Moments.of(features.to(float64_device(features.device)).double()))

    def reduce(self) -> None:
        """Merge the images of all processes into every process; without torch.distributed nothing happens.

        ValueError when only moments were kept and an image was seen by two processes: it can't be taken out again.
        """
        if self._reduced or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        if self.keep_features:
            features = torch.cat(self._features) if self._features else torch.empty(0, self.dim)
            self._features = [gather_rows(features)]
        self._seen.reduce()
        if not self.keep_features:
            if self._seen.has_doubles():
                raise ValueError("two processes have the same image: with keep_features=False it would count twice")
            self._moments = self._moments.reduced(len(self._seen.all()))
        self._reduced = True

    def compute(self) -> Statistics:
        """Statistics of all images so far. ValueError for fewer than two images or features that are not finite."""
        features = None
        moments = self._moments
        if self.keep_features:
            features = torch.cat(self._features) if self._features else torch.empty(0, self.dim)
            features = features[first_places(self._seen.all())]  # by index: any order of arrival gives the same bits
            moments = _Moments.of(features.double()) if len(features) else moments
        if moments.count < 2:
            raise ValueError(f"statistics need at least 2 images, got {moments.count}")
        cov = moments.scatter / (moments.count - 1)
        if not (moments.mean.isfinite().all() and cov.isfinite().all()):
            raise ValueError("features are not finite: the images or the feature network are broken")
        return Statistics(moments.count, moments.mean.cpu(), cov.cpu(), features)


@dataclass(frozen=True)
class _Moments:
    """Count, mean [dim], and scatter [dim, dim] = sum of (x - mean)(x - mean)^T: float64, on one device.

    Merged as by Chan et al. 1979: raw sums of squares would lose digits where means are large beside deviations.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Moments:
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def merged(self, new: _Moments) -> _Moments:
        count = self.count + new.count
        way = new.mean - self.mean.to(new.mean.device)
        scatter = self.scatter.to(new.mean.device) + new.scatter
        scatter.addr_(way, way, alpha=self.count * new.count / count)
        return _Moments(count, self.mean.to(way.device) + way * (new.count / count), scatter)

    def reduced(self, total: int) -> _Moments:
        """The moments of the `total` images of all processes."""
        mean = all_reduce_sum(self.mean * self.count) / max(1, total)
        way = self.mean.to(mean.device) - mean
        scatter = self.scatter.to(mean.device).addr(way, way, alpha=self.count)
        return _Moments(total, mean, all_reduce_sum(scatter))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + Tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), never negative (Heusel et al. 2017).

    With roots cov = R R^T, the trace of the product's root is the sum of the singular values of R_a^T R_b. scipy's
    sqrtm of the product has given wrong figures on several platforms (facts 3.1), and roots of the product's
    eigenvalues turn rounding of 1e-16 into 1e-8 wherever covariances are singular.
    Warns when a covariance is singular, as with no more images than features: then most of the value is bias.
    """
    dim = len(a.mean)
    roots = [_covariance_root(statistics) for statistics in (a, b)]
    for statistics, root in zip((a, b), roots, strict=True):
        if statistics.count is not None and statistics.count <= dim:
            warnings.warn(
                f"Frechet distance of {statistics.count} images in {dim} dimensions is mostly bias; look at KID",
                stacklevel=2,
            )
        elif root.shape[1] < dim:
            warnings.warn(
                f"Frechet distance of a singular covariance: rank {root.shape[1]} of {dim} dimensions", stacklevel=2
            )
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum() if min(r.shape[1] for r in roots) else 0
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(0.0, distance.item())


def _covariance_root(statistics: Statistics) -> Tensor:
    """R with cov = R R^T: the centred features of few images, else scaled eigenvectors [dim, rank]; float64."""
    dim, features = len(statistics.mean), statistics.features
    if features is not None and len(features) == statistics.count <= dim:
        return (features.double() - statistics.mean).T / (statistics.count - 1) ** 0.5
    values, vectors = torch.linalg.eigh(statistics.cov)
    kept = values > values[-1] * dim * torch.finfo(values.dtype).eps  # less is rounding, as in matrix_rank
    return vectors[:, kept] * values[kept].sqrt()


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


def first_places(indices: Tensor) -> Tensor:
    """Where each different index first occurs, in ascending order of the index."""
    ordered, places = torch.sort(indices, stable=True)
    first = torch.ones(len(ordered), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return places[first]


def float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU where it has no float64 (Apple's)."""
    return torch.device("cpu") if device.type == "mps" else device


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the device of their collectives."""
    tensor = tensor.to(_collective_device()).clone()
    dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes, in rank order, on the CPU; each may have another number of them."""
    world, device = dist.get_world_size(), _collective_device()
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=device))
    longest = int(max(counts))
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(count)].cpu() for part, count in zip(gathered, counts, strict=True)])


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _squared_distances(x: Tensor, y: Tensor, exclude_same: bool = False) -> Iterator[Tensor]:
    """Squared distances of blocks of rows of x to all rows of y: [<= ROWS, m]; exclude_same: none to a row itself."""
    y = y.to(x.device, torch.float64)
    lengths = y.square().sum(dim=1)
    for first in range(0, len(x), ROWS):
        block = x[first : first + ROWS].double()
        distances = torch.addmm(lengths, block, y.T, alpha=-2).add_(block.square().sum(dim=1, keepdim=True))
        if exclude_same:
            distances.diagonal(first).fill_(torch.inf)
        yield distances.clamp_(min=0)


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
