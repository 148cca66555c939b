"""Caches of latents that a test makes up, and what a cache stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latent_cache.peers.exchange import PeerLatents
from latent_cache.peers.importing import ImportConfig, Origin, describe, store
from latent_cache.read.dataset import LatentDataset
from latent_cache.read.stored_rows import stored_rows

FINGERPRINT = "0123456789abcdef" * 4


def make_cache(
    folder: Path, rows: np.ndarray, labels: np.ndarray | None = None, content: str = "mean", shard: int = 300
) -> Path:
    """Cache of raw rows [n, K, h, w], or [n, view, K, h, w] with mirrored views, through the writer of `import`."""
    rows = (rows if rows.ndim == 5 else rows[:, None]).astype(np.float32)
    labels = np.arange(len(rows)) % 10 if labels is None else labels
    peer = PeerLatents(
        folder, [], rows.shape[2:], content, rows.shape[1] == 2, labels, lambda asked: rows[asked.start : asked.stop]
    )
    dataset = {"source": "synthetic", "im_size": 64, "crop": "adm", "flip": True}
    names = [f"class {label}" for label in range(10)]
    origin = Origin({"encoder": {"name": "synthetic"}, "fingerprint": FINGERPRINT}, dataset, names)
    cfg = ImportConfig("repa", "", str(folder), samples_per_shard=shard)
    store(folder, describe(cfg, peer, origin), peer, origin)
    return folder


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def stored(cache: LatentDataset, view: int = 0) -> tuple[Tensor, np.ndarray]:
    """Values of a view as they are stored, float32 [n, K, h, w], and labels."""
    parts = list(stored_rows(cache, np.arange(len(cache)), chunk=16))
    rows = torch.from_numpy(np.concatenate([part.values[:, view] for part in parts])).float()
    return rows, np.concatenate([part.labels for part in parts])


def raw(folder: Path, view: int = 0) -> tuple[np.ndarray, Tensor | None, np.ndarray]:
    """(means, log variances or None, labels) of a cache, raw, float32."""
    cache = LatentDataset(folder)
    rows, labels = stored(cache, view)
    channels = cache.latent_shape[0]
    logvars = rows[:, channels:] + 2 * cache.norm.std.log().view(-1, 1, 1) if cache.has_moments else None
    return cache.norm.denormalise(rows[:, :channels]).numpy(), logvars, labels
