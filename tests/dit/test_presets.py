"""Every preset of the generators parses and describes a network that can be built for its latents."""

from __future__ import annotations

import pytest
import torch
import yaml

from dit.config import DiTConfig
from dit.model import DiT
from dit.tasks.build import architecture
from ssdd.engine.cli import parse
from ssdd.engine.presets import available, configs_dir

LATENTS = {"digits": (2, 2), "fashion_mnist": (4, 4)}  # channels and side; the others are named by theirs


def presets() -> list[str]:
    return [name for name in available("presets") if name.startswith("dit/")]


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("blocks", [[], ["+blocks=lightningdit,lightningdit_recipe"]], ids=["plain", "lightningdit"])
def test_a_preset_parses_and_its_network_fits_its_latents(preset, blocks):
    cfg = parse(DiTConfig, [f"preset={preset}", *blocks], program="dit", description="")
    name = preset.removeprefix("dit/")
    if name in LATENTS:
        channels, side = LATENTS[name]
    else:
        channels, side = 4, cfg.dataset.im_size // (8 if "f8" in name else 16)
    with torch.device("meta"):
        network = DiT.from_name(cfg.model.name, side, channels, 1000, **architecture(cfg))
    assert (network.feat_rope is not None) == bool(blocks)
    if name == "imagenet256_f8c4":
        assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 675
    if blocks:
        assert (cfg.training.warmup_steps, cfg.training.lr_schedule) == (0, "constant")
    if name.startswith("imagenet"):
        assert (cfg.training.batch_size, cfg.training.lr) == ((1024, 2e-4) if blocks else (256, 1e-4))


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
def test_a_preset_is_the_generator_of_the_pipeline_of_its_name(name):
    preset, pipeline = (
        yaml.safe_load((configs_dir() / f"{kind}/{name}.yaml").read_text()) for kind in ("presets/dit", "pipelines")
    )
    assert preset == pipeline["dit"] | {"dataset": pipeline["dataset"]}


def test_there_is_a_preset_for_each_of_the_latents_of_the_issue():
    sizes = [f"dit/imagenet{side}_f{stride}c4" for side in (256, 512) for stride in (8, 16)]
    assert set(presets()) == {"dit/digits", "dit/fashion_mnist", *sizes}
