"""Images through feature networks: the loop, and the statistics that every distance is computed from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssdd.engine.processes import Processes
from ssdd.engine.random import batch_generator
from ssdd.fidelity.features import FeatureNetwork, Outputs
from ssdd.fidelity.inception_score import InceptionScore
from ssdd.fidelity.moments import FeatureStatistics, Statistics


def measure(
    batches: Iterable[tuple[Tensor, Tensor]],
    networks: Sequence[FeatureNetwork],
    processes: Processes,
    keep: bool | Tensor = True,
) -> dict[str, Statistics]:
    """Network name -> statistics of the images of all processes, in all of them; no image is stored.

    batches: uint8 [n, 3, H, W] with their indices (int64 [n]), those of this process; keep: as of `SetStatistics`.
    """
    collected = SetStatistics(networks, keep)
    for images, indices in batches:
        collected.add(observe(images.to(processes.device), networks), indices)
    collected.reduce(processes)
    return collected.compute()


def observe(images: Tensor, networks: Sequence[FeatureNetwork]) -> list[Outputs]:
    """What each network makes of uint8 images [n, 3, H, W] on its device."""
    return [network.outputs(images) for network in networks]


class SetStatistics:
    """Collects what networks make of one set of images: features, and moments of spatial features and logits.

    keep: the features of all images (True), of none, or of those of these indices (int64 [n]) besides moments of all.
    Moments are enough for Frechet distances and the Inception Score; KID, precision, recall and copy rates need the
    features.
    """

    def __init__(self, networks: Sequence[FeatureNetwork], keep: bool | Tensor = True):
        self._of_networks = {network.name: _OfNetwork(network, keep) for network in networks}

    def add(self, outputs: Sequence[Outputs], indices: Tensor) -> None:
        """Add the outputs of all networks, in their order, for the images `indices` (int64 [n])."""
        for collected, found in zip(self._of_networks.values(), outputs, strict=True):
            collected.add(found, indices)

    def reduce(self, processes: Processes) -> None:
        """Merge the images of all processes into every process."""
        for collected in self._of_networks.values():
            collected.reduce(processes)

    def compute(self) -> dict[str, Statistics]:
        """Network name -> statistics."""
        return {name: collected.compute() for name, collected in self._of_networks.items()}


class _OfNetwork:
    def __init__(self, network: FeatureNetwork, keep: bool | Tensor):
        self.chosen = keep if isinstance(keep, Tensor) else None
        self.features = FeatureStatistics(network.dim, keep_features=keep is True)
        self.kept = FeatureStatistics(network.dim) if self.chosen is not None else None
        self.spatial = FeatureStatistics(network.spatial_dim, keep_features=False) if network.spatial_dim else None
        self.score = InceptionScore(network.classes) if network.classes else None

    def add(self, outputs: Outputs, indices: Tensor) -> None:
        self.features.update(outputs.features, indices)
        if self.kept is not None:
            kept = torch.isin(indices, self.chosen)
            self.kept.update(outputs.features[kept.to(outputs.features.device)], indices[kept])
        if self.spatial is not None:
            self.spatial.update(outputs.spatial, indices)
        if self.score is not None:
            self.score.update(outputs.logits, indices)

    def reduce(self, processes: Processes) -> None:
        for part in (self.features, self.kept, self.spatial, self.score):
            if part is not None:
                part.reduce(processes)

    def compute(self) -> Statistics:
        statistics = self.features.compute()
        return replace(
            statistics,
            features=statistics.features if self.kept is None else self.kept.compute().features,
            spatial=self.spatial and self.spatial.compute(),
            inception_score=self.score and self.score.compute(),
        )


def kept_of(total: int, limit: int) -> bool | Tensor:
    """Whose features to keep of a set of `total` images: all (True), or always the same `limit` of them."""
    return True if total <= limit else drawn_indices(total, limit)


def drawn_indices(total: int, count: int) -> Tensor:
    """`count` of `total` indices, always the same ones, ascending: int64 [min(count, total)]."""
    order = torch.randperm(total, generator=batch_generator("cpu", "reference images", total))
    return order[:count].sort().values
