"""The figures of a set of images on one network's features: one table, which every evaluation and report follows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ssdd.fidelity.frechet import frechet_distance
from ssdd.fidelity.kid import KernelEstimate
from ssdd.fidelity.measure import drawn_indices
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.neighbours import precision, recall

PRECISION_REFERENCES = 10_000  # real images of precision and recall, as in ADM's evaluator


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
