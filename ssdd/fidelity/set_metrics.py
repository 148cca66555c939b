"""The figures of sets of images on one network's features: one table, which every evaluation and report follows.

`compare` measures them against a reference set.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssdd.engine.random import batch_generator
from ssdd.fidelity.features import FeatureNetwork
from ssdd.fidelity.frechet import frechet_distance
from ssdd.fidelity.kid import KernelEstimate, kernel_bootstrap
from ssdd.fidelity.measure import drawn_indices
from ssdd.fidelity.moments import FeatureStatistics, Statistics
from ssdd.fidelity.neighbours import precision, recall

PRECISION_REFERENCES = 10_000  # real images of precision and recall, as in ADM's evaluator
KERNEL_IMAGES = 10_000  # of a set at most, in a KID over all pairs: its bootstrap takes n^2 memory traffic per resample
IMAGES_A_DIMENSION = 10  # below this a Frechet distance is mostly bias and decides nothing


class Compared(NamedTuple):
    """A set of images and what it is compared with.

    originals: of Frechet distances; reals, kernel: other real images, and the KID to them, None where features were not
    kept. They must not be the very images that were reconstructed: pairs of an image and its own reconstruction would
    make the unbiased KID negative.
    """

    row: Statistics
    originals: Statistics
    reals: Statistics | None
    kernel: KernelEstimate | None


@dataclass(frozen=True)
class SetMetric:
    """A figure of a set.

    measure: None where the network or the statistics do not have what it needs; of_features: measured only where
    features were kept; slow: takes a time that grows with the square of the images.
    label: of its column in tables, "" for none; {side} is g for generated and r for reconstructed images, {FD} the name
    of a Frechet distance. decimals, better (an arrow): of that column.
    """

    measure: Callable[[Compared], float | None]
    label: str = ""
    decimals: int = 3
    better: str = ""
    of_features: bool = False
    slow: bool = False

    def title(self, network: str, side: str = "") -> str:
        """The label of its column on the features of `network`."""
        return self.label.format(side=side, FD=distance_name(network))


def distance_name(network: str) -> str:
    """A Frechet distance is called FID on Inception's features only."""
    return "FID" if network == "inception" else "FD"


def _frechet(a: Statistics | None, b: Statistics | None) -> float | None:
    if a is None or b is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller prints the floor with the distance
        return frechet_distance(a, b)


def _score(row: Statistics, part: int) -> float | None:
    return None if row.inception_score is None else row.inception_score[part]


SET_METRICS = {
    "kid": SetMetric(lambda c: c.kernel.value, "{side}KID", 4, "↓", of_features=True),
    "kid_low": SetMetric(lambda c: c.kernel.low, of_features=True),
    "kid_high": SetMetric(lambda c: c.kernel.high, of_features=True),
    "kid_deviation": SetMetric(lambda c: c.kernel.deviation, of_features=True),
    "frechet": SetMetric(lambda c: _frechet(c.row, c.originals), "{side}{FD}", 3, "↓"),
    "spatial_frechet": SetMetric(lambda c: _frechet(c.row.spatial, c.originals.spatial), "s{FD}", 3, "↓"),
    "inception_score": SetMetric(lambda c: _score(c.row, 0), "IS", 2, "↑"),
    "inception_score_deviation": SetMetric(lambda c: _score(c.row, 1)),
    "precision": SetMetric(
        lambda c: precision(drawn(c.reals.features, PRECISION_REFERENCES), c.row.features),
        "precision", 3, "↑", of_features=True, slow=True,
    ),
    "recall": SetMetric(
        lambda c: recall(drawn(c.reals.features, PRECISION_REFERENCES), c.row.features),
        "recall", 3, "↑", of_features=True, slow=True,
    ),
}  # fmt: skip
"""Key of a result -> figure. A figure with an interval has its ends under its key with _low and _high."""


def drawn(features: Tensor, count: int) -> Tensor:
    """`count` rows of features [n, dim], always the same ones, in their order; all where n is not larger."""
    return features if len(features) <= count else features[drawn_indices(len(features), count)]


def compare(
    sets: dict[str, Statistics],
    rows: Sequence[str],
    originals: str,
    reals: str | None,
    resamples: int,
    seed: int,
    slow: bool = True,
) -> tuple[dict[str, dict[str, float]], dict[str, KernelEstimate]]:
    """The figures of `SET_METRICS` for the sets `rows` on the features of one network.

    Frechet distances are to the set `originals`; KID with its 95 % bootstrap interval over images, precision and recall
    are to the set `reals`. Precision and recall take 10 000 of `reals` at most, as ADM's evaluator does, KID 10 000 of
    every set. Without `reals`, or without kept features, these are omitted. slow=False omits the slow ones.
    Returns (row -> {key: figure}, row -> its KID's bootstrap).
    """
    of_features = reals is not None and all(sets[name].features is not None for name in [*rows, reals])
    kernels: dict[str, KernelEstimate] = {}
    if of_features:
        features = {row: drawn(sets[row].features, KERNEL_IMAGES) for row in rows}
        kernels = kernel_bootstrap(features, drawn(sets[reals].features, KERNEL_IMAGES), resamples, seed)
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        compared = Compared(sets[row], sets[originals], sets[reals] if of_features else None, kernels.get(row))
        figures = {
            name: metric.measure(compared)
            for name, metric in SET_METRICS.items()
            if (of_features or not metric.of_features) and (slow or not metric.slow)
        }
        scores[row] = {name: value for name, value in figures.items() if value is not None}
    return scores, kernels


def few_images(images: str, count: int | None, network: FeatureNetwork) -> list[str]:
    """A note on `count` images (None: not recorded) that are too few for a Frechet distance; else none.

    images: what they are and how many, such as "50 samples".
    """
    needed = IMAGES_A_DIMENSION * network.dim
    if count is None or count >= needed:
        return []
    return [
        f"{images} are fewer than {IMAGES_A_DIMENSION} per dimension of {network.name.split(':')[0]} ({needed}): most "
        "of its Frechet distance is bias. Look at KID with its interval, and at the ratio to the floor"
    ]


def frechet_floor(reference: Statistics, count: int) -> tuple[float, tuple[int, int]] | None:
    """Frechet distance between two disjoint random parts of the reference's own images, and the sizes of the parts.

    The first part has `count` images, or half of the reference where that is fewer. A distance of `count` images to
    this reference that is not larger cannot be distinguished from that of real images. None without kept features.
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
