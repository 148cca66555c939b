"""Image sets against a reference set, by several feature networks at once: every metric of fidelity.py and kid.py."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssdd.engine.features import FeatureNetwork, Outputs, load_features
from ssdd.engine.fidelity import FeatureStatistics, Statistics, frechet_distance, precision_recall
from ssdd.engine.inception_score import InceptionScore
from ssdd.engine.kid import KernelEstimate, kernel_bootstrap
from ssdd.engine.noise import batch_generator
from ssdd.engine.weights import has

AUTOMATIC = ("inception", "efficientnet_lite0")
PRECISION_REFERENCES = 10_000  # real images of precision and recall, as in ADM's evaluator
KERNEL_IMAGES = 10_000  # of a set at most, in a KID over all pairs: its bootstrap takes n^2 memory traffic a resample
IMAGES_A_DIMENSION = 10  # below this a Frechet distance is mostly bias and decides nothing


def load_networks(names: Sequence[str], device: Any) -> list[FeatureNetwork]:
    """Feature networks by name; "auto" stands for those of `AUTOMATIC` whose weights are on this machine.

    UserError for a network that is named and has no weights.
    """
    chosen: list[str] = []
    for name in names:
        chosen += [n for n in AUTOMATIC if has(n)] if name == "auto" else [name]
    return [load_features(name, device) for name in dict.fromkeys(chosen)]


def automatic_without_weights(names: Sequence[str]) -> list[str]:
    """What "auto" among `names` leaves out on this machine."""
    return [name for name in AUTOMATIC if "auto" in names and name not in names and not has(name)]


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
    """What one network says of one set: features, and moments of its spatial features and logits where it has them.

    keep: the features of all images (True), of none, or of those of these indices (int64 [n]) beside moments of all.
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


def compare(
    sets: dict[str, Statistics],
    rows: Sequence[str],
    originals: str,
    reals: str | None,
    resamples: int,
    seed: int,
    with_precision: bool = True,
) -> tuple[dict[str, dict[str, float]], dict[str, KernelEstimate]]:
    """Scores of the sets `rows` on the features of one network.

    The Frechet distance is to the set `originals`, also that of spatial features (sFID) where the network has them; the
    Inception Score is the row's own. KID with its 95 % bootstrap interval over images, precision and recall are to the
    set `reals`, which must not be the very images that were reconstructed: pairs of an image and its own reconstruction
    would make the unbiased KID negative. Precision and recall take 10 000 of `reals` at most, as ADM's evaluator does,
    KID 10 000 of every set.
    Without `reals`, or without kept features, these are left out. with_precision=False leaves out precision and recall,
    whose time grows with the square of a row's images.
    Returns (row -> {frechet, spatial_frechet, inception_score, inception_score_deviation, kid, kid_low, kid_high,
    kid_deviation, precision, recall}, row -> its KID's bootstrap).
    """
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller prints the floor beside the distance
            scores[row] = {"frechet": frechet_distance(sets[row], sets[originals])}
            if sets[row].spatial is not None and sets[originals].spatial is not None:
                scores[row]["spatial_frechet"] = frechet_distance(sets[row].spatial, sets[originals].spatial)
        if sets[row].inception_score is not None:
            scores[row]["inception_score"], scores[row]["inception_score_deviation"] = sets[row].inception_score
    if reals is None or any(sets[name].features is None for name in [*rows, reals]):
        return scores, {}
    features = sets[reals].features
    kernels = kernel_bootstrap(
        {row: drawn(sets[row].features, KERNEL_IMAGES) for row in rows}, drawn(features, KERNEL_IMAGES), resamples, seed
    )
    for row, kernel in kernels.items():
        scores[row] |= {
            "kid": kernel.value,
            "kid_low": kernel.low,
            "kid_high": kernel.high,
            "kid_deviation": kernel.deviation,
        }
        if with_precision:
            precision, recall = precision_recall(drawn(features, PRECISION_REFERENCES), sets[row].features)
            scores[row] |= {"precision": precision, "recall": recall}
    return scores, kernels


def drawn(features: Tensor, count: int) -> Tensor:
    """`count` rows of features [n, dim], always the same ones, in their order; all where n is no larger."""
    return features if len(features) <= count else features[drawn_indices(len(features), count)]


def drawn_indices(total: int, count: int) -> Tensor:
    """`count` of `total` indices, always the same ones, ascending: int64 [min(count, total)]."""
    order = torch.randperm(total, generator=batch_generator("cpu", "reference images", total))
    return order[:count].sort().values


def frechet_floor(reference: Statistics, count: int) -> tuple[float, tuple[int, int]] | None:
    """Frechet distance between two disjoint random parts of the reference's own images, and the sizes of the parts.

    The first part has `count` images, or half of the reference where that is fewer. No distance of `count` images to
    this reference can be told from that of real ones when it is no larger. None without kept features.
    """
    if reference.features is None or min(count, len(reference.features) // 2) < 2:
        return None
    total = len(reference.features)
    order = torch.randperm(total, generator=batch_generator("cpu", "frechet floor", total))
    count = min(count, total // 2)
    parts = []
    for rows in (order[:count].sort().values, order[count:].sort().values):
        part = FeatureStatistics(reference.features.shape[1])
        part.update(reference.features[rows], rows)
        parts.append(part.compute())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return frechet_distance(*parts), (count, total - count)


def paired_differences(kernels: dict[str, KernelEstimate], rows: Sequence[str]) -> dict[str, dict[str, float]]:
    """KID differences "a - b" of sets that share their latents, with 95 % intervals of the paired bootstrap."""
    differences = {}
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            low, high = np.percentile(kernels[a].resampled - kernels[b].resampled, [2.5, 97.5]).tolist()
            differences[f"{a} - {b}"] = {"kid": kernels[a].value - kernels[b].value, "low": low, "high": high}
    return differences
