"""Tiny caches of real digits behind a tiny untrained encoder, and settings that train on them in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dit.config import DiTConfig, DiTTrainingConfig, ModelConfig
from latent_cache.write.build import build
from ssdd.engine.ema import EmaConfig
from tests.small_cache import small_build
from tests.small_tokenizer import save_encoder


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of 60 digits as latents of 2 x 4 x 4, by content: posterior means and moments. Not to be changed."""
    root = tmp_path_factory.mktemp("caches")
    tokenizer = save_encoder(root / "tokenizer")
    for content in ("mean", "moments"):
        build(small_build(tokenizer, root / content, dataset={"im_size": 32}, content=content, splits=["train"]))
    return {content: root / content for content in ("mean", "moments")}


@pytest.fixture
def settings(caches: dict[str, Path], tmp_path: Path) -> Callable[..., DiTConfig]:
    """Config of a ten-step run; keyword arguments change the training keys."""

    def make(run_name: str = "run", content: str = "mean", **training: object) -> DiTConfig:
        values = {"steps": 10, "batch_size": 16, "lr": 3e-3, "save_every": 4, "log_freq": 1, "mixed_precision": "no"}
        return DiTConfig(
            run_name=run_name,
            ckpt_dir=str(tmp_path),
            cache=str(caches[content]),
            model=ModelConfig(name="DiT-XXS/1"),
            training=DiTTrainingConfig(**{**values, "ema": EmaConfig(decays=[0.9], start_iter=2), **training}),
        )

    return make
