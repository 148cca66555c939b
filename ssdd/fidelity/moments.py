"""Statistics of a set's features: mean and covariance in float64, collected over batches and processes.

Features are collected by `FeatureStatistics`: update, reduce over processes, compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssdd.engine.devices import float64_device
from ssdd.engine.processes import Processes


@dataclass(frozen=True)
class Statistics:
    """What a set of images looks like to a feature network.

    count: images, None when a foreign file does not record it; mean: float64 [dim]; cov: float64 [dim, dim], divided by
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
    """The indices of the images added so far, in order of arrival; a batch takes as long however many there are."""

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

    def reduce(self, processes: Processes) -> None:
        """Those of all processes, in rank order; what two of them have is there twice."""
        self._parts = [processes.gather(self.all())]

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
        self._seen = SeenIndices()  # one per row of `_features`
        self._features: list[Tensor] = []
        self._moments = _Moments(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    def update(self, features: Tensor, indices: Tensor) -> None:
        """Add float features [n, dim] of the images `indices` (int64 [n]); an index added before is ignored."""
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

    def reduce(self, processes: Processes) -> None:
        """Merge the images of all processes into every process.

        ValueError when only moments were kept and an image was seen by two processes: it can't be taken out again.
        """
        if self._reduced or processes.world == 1:
            return
        if self.keep_features:
            features = torch.cat(self._features) if self._features else torch.empty(0, self.dim)
            self._features = [processes.gather(features)]
        self._seen.reduce(processes)
        if not self.keep_features:
            if self._seen.has_doubles():
                raise ValueError("two processes have the same image: with keep_features=False it would count twice")
            self._moments = self._moments.reduced(len(self._seen.all()), processes)
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
            raise ValueError("features are not finite: check the images and the feature network")
        return Statistics(moments.count, moments.mean.cpu(), cov.cpu(), features)


@dataclass(frozen=True)
class _Moments:
    """Count, mean [dim], and scatter [dim, dim] = sum of (x - mean)(x - mean)^T: float64, on one device.

    Merged as by Chan et al. 1979: raw sums of squares would lose digits where means are large compared with deviations.
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

    def reduced(self, total: int, processes: Processes) -> _Moments:
        """The moments of the `total` images of all processes."""
        mean = processes.sum(self.mean * self.count) / max(1, total)
        way = self.mean - mean
        return _Moments(total, mean, processes.sum(self.scatter.addr(way, way, alpha=self.count)))


def first_places(indices: Tensor) -> Tensor:
    """Where each different index first occurs, in ascending order of the index."""
    ordered, places = torch.sort(indices, stable=True)
    first = torch.ones(len(ordered), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return places[first]
