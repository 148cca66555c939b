"""Image sets against a reference set, on one network's features: Frechet, KID, precision, recall, floors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from ssdd.engine.random import batch_generator
from ssdd.fidelity.frechet import frechet_distance
from ssdd.fidelity.kid import KernelEstimate, kernel_bootstrap
from ssdd.fidelity.moments import FeatureStatistics, Statistics
from ssdd.fidelity.set_metrics import SET_METRICS, Compared, drawn

KERNEL_IMAGES = 10_000  # of a set at most, in a KID over all pairs: its bootstrap takes n^2 memory traffic per resample
IMAGES_A_DIMENSION = 10  # below this a Frechet distance is mostly bias and decides nothing


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
