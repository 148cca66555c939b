"""Sets of images through feature networks: the statistics that every distance is computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_json
from ssdd.engine.random import batch_generator
from ssdd.fidelity.features import FeatureNetwork, Outputs
from ssdd.fidelity.inception_score import InceptionScore
from ssdd.fidelity.moments import FeatureStatistics, Statistics
from ssdd.fidelity.statistics import load_statistics, save_statistics
from ssdd.fidelity.stored_sets import ImageSet

KEPT_IMAGES = 100_000  # whose features are kept: two parts of 50 000 for a floor


def measure(images: ImageSet, network: FeatureNetwork, batch_size: int, keep_features: bool = True) -> Statistics:
    """Statistics of all images of a set, in this process, on the network's device; no image is stored.

    keep_features: also keep features, those of 100 000 images at most.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    some = keep_features and len(images) > KEPT_IMAGES
    collected = Collected(network, drawn_indices(len(images), KEPT_IMAGES) if some else keep_features)
    for pixels, indices in images.batches(batch_size):
        collected.update(network.outputs(pixels.to(device)), indices)
    return collected.compute()


def measure_once(images: ImageSet, network: FeatureNetwork, batch_size: int, cache: Path) -> Statistics:
    """`measure`, or what it gave for the same images, crop and weights before: a file in the folder `cache`."""
    provenance = provenance_of(images, network)
    path = cache / f"{sha256_json(provenance)}.safetensors"
    if path.is_file():
        return load_statistics(path)[0]
    statistics = measure(images, network, batch_size)
    try:
        save_statistics(path, statistics, provenance)
    except OSError as problem:  # a home that can't be written to
        raise UserError(
            f"can't store statistics in {cache}: {problem}; set cache=FOLDER, or cache= to disable storing them"
        ) from None
    return statistics


def provenance_of(images: ImageSet, network: FeatureNetwork) -> dict[str, Any]:
    """What the statistics of a set are a function of: network, weights, resize, crop, size, counts, fingerprint."""
    treatment = images.treatment
    size = list(treatment.size) if treatment.size else None
    return {
        **network.provenance(),
        "crop": treatment.crop,
        "size": size,
        "count": len(images),
        "kept_features": min(KEPT_IMAGES, len(images)),
        "fingerprint": images.fingerprint(),
    }


class SetScores:
    """Collects the features of named image sets, then compares them with one of them; no image is stored.

    keep_features=False holds moments only, which is enough for Frechet distances and the Inception Score; KID,
    precision, recall and copy rates need the features.
    """

    def __init__(self, networks: Sequence[FeatureNetwork], keep_features: bool = True):
        self.networks = list(networks)
        self.keep_features = keep_features
        self._collected: dict[str, list[Collected]] = {}

    def update(self, name: str, images: Tensor, indices: Tensor) -> None:
        """Add uint8 images [n, 3, H, W] with their indices (int64 [n]) to the set `name`."""
        for network, collected in zip(self.networks, self._sets(name), strict=True):
            collected.update(network.outputs(images), indices)

    def _sets(self, name: str) -> list[Collected]:
        if name not in self._collected:
            self._collected[name] = [Collected(network, self.keep_features) for network in self.networks]
        return self._collected[name]

    def compute(self) -> dict[str, dict[str, Statistics]]:
        """Network name -> set name -> statistics, merged over all processes."""
        names = gathered_keys(self._collected)
        for name in names:  # in the same order everywhere, also in a process that has no image of a set
            for collected in self._sets(name):
                collected.reduce()
        return {
            network.name: {name: self._collected[name][i].compute() for name in names}
            for i, network in enumerate(self.networks)
        }


class Collected:
    """Statistics of one set on one network: features, and moments of its spatial features and logits where it has them.

    keep: the features of all images (True), of none, or of those of these indices (int64 [n]) besides moments of all.
    """

    def __init__(self, network: FeatureNetwork, keep: bool | Tensor):
        self.chosen = keep if isinstance(keep, Tensor) else None
        self.features = FeatureStatistics(network.dim, keep_features=keep is True)
        self.kept = FeatureStatistics(network.dim) if self.chosen is not None else None
        self.spatial = FeatureStatistics(network.spatial_dim, keep_features=False) if network.spatial_dim else None
        self.score = InceptionScore(network.classes) if network.classes else None

    def update(self, outputs: Outputs, indices: Tensor) -> None:
        self.features.update(outputs.features, indices)
        if self.kept is not None:
            kept = torch.isin(indices, self.chosen)
            self.kept.update(outputs.features[kept.to(outputs.features.device)], indices[kept])
        if self.spatial is not None:
            self.spatial.update(outputs.spatial, indices)
        if self.score is not None:
            self.score.update(outputs.logits, indices)

    def reduce(self) -> None:
        for part in (self.features, self.kept, self.spatial, self.score):
            if part is not None:
                part.reduce()

    def compute(self) -> Statistics:
        statistics = self.features.compute()
        return replace(
            statistics,
            features=statistics.features if self.kept is None else self.kept.compute().features,
            spatial=self.spatial and self.spatial.compute(),
            inception_score=self.score and self.score.compute(),
        )


def gathered_keys(collected: Mapping[str, Any]) -> list[str]:
    """The keys that any process has, in one order for all."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(collected)
    keys: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(keys, list(collected))
    return list(dict.fromkeys(key for own in keys for key in own))


def drawn_indices(total: int, count: int) -> Tensor:
    """`count` of `total` indices, always the same ones, ascending: int64 [min(count, total)]."""
    order = torch.randperm(total, generator=batch_generator("cpu", "reference images", total))
    return order[:count].sort().values
