"""Tiny caches of real digits, made by a real, tiny, untrained SSDD encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_cache.config import BuildConfig, ViewsConfig, adm_images
from latent_cache.write.build import build
from ssdd.model.tokenizer import SSDD
from tests.latent_cache.synthetic import make_cache, normal

Settings = Callable[..., BuildConfig]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an f8c2 tokenizer whose posteriors have clear means and variances."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SSDD({"name": "f8c2", "width": 16}, "XXS", encoder_train=True)
        with torch.no_grad():
            model.encoder.out_proj.bias.copy_(torch.tensor([0.5, -2.0, -1.0, 1.0]))
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(tokenizer: Path) -> Settings:
    """Settings of a small build: 60 digits a split at 16 pixels, in shards of 16."""

    def make(out: Path, flip: bool = False, dataset: dict | None = None, **changes: object) -> BuildConfig:
        images = {"source": "digits", "im_size": 16, "limit": 60, "flip": flip or None} | (dataset or {})
        changes = {"samples_per_shard": 16, "batch_size": 8, "device": "cpu"} | changes
        return BuildConfig(
            str(tokenizer), str(out), dataset=replace(adm_images(), **images), views=ViewsConfig(flip), **changes
        )

    return make


@pytest.fixture(scope="session")
def means(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of posterior means. Not to be changed."""
    folder = tmp_path_factory.mktemp("means") / "cache"
    build(settings(folder))
    return folder


@pytest.fixture(scope="session")
def moments(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of posterior means and log variances with mirrored views. Not to be changed."""
    folder = tmp_path_factory.mktemp("moments") / "cache"
    build(settings(folder, flip=True, content="moments"))
    return folder


@pytest.fixture(scope="session")
def posterior_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 posteriors [2, 3 channels, 4, 4] with both views, far from mean 0 and deviation 1, in shards of 16."""
    rows = np.concatenate([uneven_means(), normal(50, 2, 3, 4, 4, seed=1) - 2], 2)
    return make_cache(tmp_path_factory.mktemp("posteriors") / "cache", rows, content="moments", shard=16)


@pytest.fixture(scope="session")
def mean_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 means with both views, in shards of 16."""
    return make_cache(tmp_path_factory.mktemp("uneven_means") / "cache", uneven_means(), shard=16)


def uneven_means() -> np.ndarray:
    return normal(50, 2, 3, 4, 4) * [[[2.0]], [[0.1]], [[1.0]]] + [[[1.0]], [[-0.2]], [[0.0]]]
