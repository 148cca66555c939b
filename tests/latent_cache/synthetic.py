"""Caches of latents that a test makes up."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from latent_cache.config import ImportConfig
from latent_cache.peers.exchange import PeerLatents
from latent_cache.peers.importing import Origin, describe, store

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
