"""Statistics of sets of images on feature networks: the loop over the images, files, and the one cache of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssdd.engine.checkpoint import load_tensors, save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import sha256_json
from ssdd.engine.processes import Processes
from ssdd.engine.random import batch_generator
from ssdd.engine.user_cache import cache_folder
from ssdd.fidelity.features import FeatureNetwork, Outputs
from ssdd.fidelity.inception_score import InceptionScore
from ssdd.fidelity.moments import FeatureStatistics, Statistics
from ssdd.fidelity.stored_sets import Treatment

FORMAT = "ssdd fidelity statistics 1"
KEPT_IMAGES = 100_000  # whose features are kept: two parts of 50 000 for a floor
BATCH = 64

log = logging.getLogger(__name__)


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


class ImageSet(Protocol):
    """Images that can be measured, here or by several processes together."""

    treatment: Treatment

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Hex sha256 of what the set holds, not of where it lies."""

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 [n, 3, H, W], indices int64 [n]) of the images rank, rank + world, ..."""


def default_cache() -> Path:
    """Where statistics of real images are kept unless a caller says otherwise."""
    return cache_folder() / "fidelity"


def measure_once(
    images: ImageSet,
    networks: Sequence[FeatureNetwork],
    processes: Processes,
    cache: Path | None,
    batch_size: int = BATCH,
    kept: int = KEPT_IMAGES,
) -> dict[str, Statistics]:
    """Network name -> statistics of all images, in the main process; {} in the others, which measure their share.

    What was measured before for the same images, treatment and weights is a file in the folder `cache` (None stores
    nothing). kept: features are kept of so many images at most, always the same ones.
    """
    described = processes.agree(lambda: provenance_of(images, networks, kept))
    files = {name: cache / f"{sha256_json(own)}.safetensors" for name, own in described.items()} if cache else {}
    known = processes.agree(lambda: [name for name, file in files.items() if os.path.isfile(file)])
    missing = [network for network in networks if network.name not in known]
    measured: dict[str, Statistics] = {}
    if missing:
        batches = images.batches(batch_size, processes.rank, processes.world)
        measured = measure(batches, missing, processes, kept_of(len(images), kept))
    if not processes.is_main:
        return {}
    for name in files.keys() & measured.keys():
        try:
            save_statistics(files[name], measured[name], described[name])
        except OSError as problem:  # a home that can't be written to, or is full
            log.warning("can't store statistics in %s, so they are measured again next time: %s", cache, problem)
    return {network.name: measured.get(network.name) or load_statistics(files[network.name])[0] for network in networks}


def provenance_of(
    images: ImageSet, networks: Sequence[FeatureNetwork], kept: int = KEPT_IMAGES
) -> dict[str, dict[str, Any]]:
    """Network name -> what the statistics of a set are a function of: network, weights, resize, crop, size, counts,
    fingerprint.
    """
    if not networks:
        return {}
    treatment = images.treatment
    of_images = {
        "crop": treatment.crop,
        "size": list(treatment.size) if treatment.size else None,
        "count": len(images),
        "kept_features": min(kept, len(images)),
        "fingerprint": images.fingerprint(),
    }
    return {network.name: network.provenance() | of_images for network in networks}


def save_statistics(path: str | Path, statistics: Statistics, provenance: dict[str, Any]) -> None:
    """Write statistics and where they come from; whole or not at all."""
    tensors = {"mean": statistics.mean, "cov": statistics.cov}
    if statistics.features is not None:
        tensors["features"] = statistics.features
    if statistics.spatial is not None:
        tensors |= {"spatial_mean": statistics.spatial.mean, "spatial_cov": statistics.spatial.cov}
    described = {"count": statistics.count, "inception_score": statistics.inception_score, "provenance": provenance}
    save_tensors(path, tensors, {"format": FORMAT, "statistics": json.dumps(described, sort_keys=True)})


def load_statistics(path: str | Path) -> tuple[Statistics, dict[str, Any]]:
    """Statistics and provenance as given to `save_statistics`; UserError when the file is of another kind."""
    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{path} is not a complete safetensors file: {problem}") from problem
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} holds no statistics: its format is {metadata.get('format')!r}, expected {FORMAT!r}")
    tensors, described = load_tensors(path), json.loads(metadata["statistics"])
    count, score = described["count"], described["inception_score"]
    spatial = None
    if "spatial_mean" in tensors:
        spatial = Statistics(count, tensors["spatial_mean"], tensors["spatial_cov"])
    statistics = Statistics(
        count, tensors["mean"], tensors["cov"], tensors.get("features"), spatial, tuple(score) if score else None
    )
    return statistics, described["provenance"]
