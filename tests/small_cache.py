"""Settings of a latent cache small enough for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from latent_cache.config import BuildConfig, ViewsConfig, adm_images


def small_build(
    tokenizer: Path, out: Path, flip: bool = False, dataset: dict | None = None, **changes: object
) -> BuildConfig:
    """60 digits a split at 16 pixels, in shards of 16; flip: mirror images are stored too."""
    images = {"source": "digits", "im_size": 16, "limit": 60, "flip": flip or None} | (dataset or {})
    changes = {"samples_per_shard": 16, "batch_size": 8, "device": "cpu"} | changes
    return BuildConfig(
        str(tokenizer), str(out), dataset=replace(adm_images(), **images), views=ViewsConfig(flip), **changes
    )
