"""Tiny caches of real digits behind a tiny untrained encoder, and settings that train on them in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dit.config import DiTConfig, ModelConfig, TrainingConfig
from latent_cache.config import BuildConfig
from latent_cache.write.build import build
from ssdd.engine.ema import EmaConfig
from ssdd.images.sources import DatasetConfig
from ssdd.model.tokenizer import SSDD


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of 60 digits as latents of 2 x 4 x 4, by content: posterior means and moments. Not to be changed."""
    root = tmp_path_factory.mktemp("caches")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SSDD({"name": "f8c2", "width": 16}, "XXS", encoder_train=True).save_pretrained(root / "tokenizer")
    for content in ("mean", "moments"):
        dataset = DatasetConfig(source="digits", im_size=32, limit=60, crop="adm")
        build(
            BuildConfig(
                tokenizer=str(root / "tokenizer"),
                out=str(root / content),
                content=content,
                splits=["train"],
                dataset=dataset,
                device="cpu",
            )
        )
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
            training=TrainingConfig(**{**values, "ema": EmaConfig(decays=[0.9], start_iter=2), **training}),
        )

    return make
