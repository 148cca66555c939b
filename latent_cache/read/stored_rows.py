"""Straight passes over the stored rows of one split: no order to draw, no posterior to sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from latent_cache.manifest import layout_of, shard_ranges
from latent_cache.read.dataset import LatentDataset
from latent_cache.shard import Shard, shard_name


class Rows(NamedTuple):
    """Samples `indices` of a split: stored values float16 [n, view, K, h, w], normalised, and labels int64 [n]."""

    indices: np.ndarray
    values: np.ndarray
    labels: np.ndarray


def stored_rows(cache: LatentDataset, indices: np.ndarray, chunk: int) -> Iterator[Rows]:
    """The samples `indices` (ascending), at most `chunk` at a time; chunks may be smaller where a shard ends."""
    layout = layout_of(cache.manifest)
    for number, samples in enumerate(shard_ranges(cache.manifest, cache.split)):
        first, last = np.searchsorted(indices, (samples.start, samples.stop))
        if first == last:
            continue
        shard = Shard(cache.path / cache.split / f"{shard_name(number)}.tar", layout, samples)
        for start in range(first, last, chunk):
            asked = indices[start : min(start + chunk, last)]
            places = asked - samples.start
            views = [shard.rows(places, view) for view in layout.views]
            yield Rows(asked, np.stack(views, 1), shard.labels(places))


def spread(count: int, limit: int | None) -> np.ndarray:
    """Indices of at most `limit` of `count` samples, evenly spread, since sets are often sorted by class: int64 [n]."""
    n = count if limit is None else min(limit, count)
    return np.arange(n, dtype=np.int64) * count // n
