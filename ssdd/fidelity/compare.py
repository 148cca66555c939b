"""Image sets against a reference set, on one network's features: Frechet, KID, precision, recall, floors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssdd.engine.random import batch_generator
from ssdd.fidelity.frechet import frechet_distance
from ssdd.fidelity.kid import KernelEstimate, kernel_bootstrap
from ssdd.fidelity.measure import drawn_indices
from ssdd.fidelity.moments import FeatureStatistics, Statistics
from ssdd.fidelity.neighbours import precision_recall

PRECISION_REFERENCES = 10_000  # real images of precision and recall, as in ADM's evaluator
KERNEL_IMAGES = 10_000  # of a set at most, in a KID over all pairs: its bootstrap takes n^2 memory traffic per resample
IMAGES_A_DIMENSION = 10  # below this a Frechet distance is mostly bias and decides nothing


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
    Without `reals`, or without kept features, these are omitted. with_precision=False omits precision and recall,
    whose time grows with the square of a row's images.
    Returns (row -> {frechet, spatial_frechet, inception_score, inception_score_deviation, kid, kid_low, kid_high,
    kid_deviation, precision, recall}, row -> its KID's bootstrap).
    """
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller prints the floor with the distance
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
    """`count` rows of features [n, dim], always the same ones, in their order; all where n is not larger."""
    return features if len(features) <= count else features[drawn_indices(len(features), count)]


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
