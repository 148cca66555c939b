"""Tiny caches of real digits, made by a real, tiny, untrained SSDD encoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from latent_cache.config import BuildConfig
from latent_cache.write.build import build
from tests.latent_cache.synthetic import make_cache, normal
from tests.small_cache import small_build
from tests.small_tokenizer import save_encoder

Settings = Callable[..., BuildConfig]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an f8c2 tokenizer whose posteriors have clear means and variances."""
    return save_encoder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def settings(tokenizer: Path) -> Settings:
    """Settings of a small build by that tokenizer."""
    return partial(small_build, tokenizer)


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
