"""Normal features, and statistics collected of features in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from ssdd.fidelity.moments import FeatureStatistics, Statistics


def normal(n: int, dim: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def statistics_of(features: Tensor, batch_size: int = 1000, keep_features: bool = True) -> Statistics:
    collected = FeatureStatistics(features.shape[1], keep_features)
    indices = torch.arange(len(features))
    for rows, own in zip(features.split(batch_size), indices.split(batch_size), strict=True):
        collected.update(rows, own)
    return collected.compute()
