"""A source of images is one entry of a table: its name is a choice, and training, caches and records follow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from latent_cache.__main__ import main as latent_cache_main
from ssdd import SSDD
from ssdd.config import SSDDConfig
from ssdd.engine.checkpoint import load_state
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.run import RunDirectory
from ssdd.engine.schema_help import help_text
from ssdd.images.small_sets import PixelArray
from ssdd.images.sources import SOURCES, DatasetConfig, Source, open_source
from ssdd.tasks.train import run as train
from tests.small_tokenizer import ARGUMENTS

DATA = ["dataset.source=stripes", "dataset.root=16"]


def read_stripes(cfg: DatasetConfig, split: str) -> tuple[PixelArray, np.ndarray, list[str]]:
    """Pictures of 16 pixels with stripes of one of two widths, brighter from one to the next."""
    columns = np.arange(int(cfg.root))
    widths, count = (1, 2), 8 if split == "train" else 4
    pictures = [np.tile(columns // width % 2 * (100 + 10 * i), (16, 1)) for i in range(count) for width in widths]
    return PixelArray(np.stack(pictures).astype(np.uint8)), np.arange(2 * count) % 2, ["thin", "wide"]


@pytest.fixture(autouse=True)
def stripes(monkeypatch):
    """The source "stripes"."""
    monkeypatch.setitem(SOURCES, "stripes", Source(read_stripes, flip=False, decodes=False, root="PIXELS of a side"))


def config(folder: Path, *arguments: str) -> SSDDConfig:
    own = [*DATA, f"ckpt_dir={folder}", "run_name=run", "training.steps=2", *arguments]
    return parse(SSDDConfig, [*ARGUMENTS, *own], program="ssdd", description="")


def test_the_help_lists_it_and_what_it_needs_is_said(tmp_path):
    text = help_text(SSDDConfig, "ssdd", "")
    assert "dataset.source  (digits | fashion_mnist | imagefolder | webdataset | stripes; default imagefolder)" in text
    with pytest.raises(UserError, match="did you mean stripes"):
        config(tmp_path, "dataset.source=stripe")
    with pytest.raises(UserError, match="dataset.source=stripes needs dataset.root=PIXELS of a side"):
        open_source(DatasetConfig(source="stripes"), "train")


def test_its_pictures_are_read_limited_and_mirrored_as_it_says():
    cfg = DatasetConfig(source="stripes", root="16", im_size=16, limit=6)
    source = open_source(cfg, "train")
    assert np.bincount(source.labels).tolist() == [3, 3] and source.class_names == ["thin", "wide"]
    assert source.flip is False and cfg.reading_processes == 0
    assert source.where(2) == "stripes train image 2"


def test_it_trains_and_its_fingerprint_is_recorded(tmp_path):
    cfg = config(tmp_path)
    assert train(cfg)["diffusion"] > 0
    identity = load_state(RunDirectory(tmp_path, "run").last)["identity"]
    assert identity["data"] == open_source(cfg.dataset, "train").fingerprint()
    assert train(config(tmp_path, "training.steps=3"))["steps"] == 3
    with pytest.raises(UserError, match="data was"):
        train(config(tmp_path, "training.steps=4", "dataset.source=digits"))


def test_a_cache_is_built_of_it(tmp_path):
    SSDD({"name": "f8c2", "width": 8}, "XXS", encoder_train=True).save_pretrained(tmp_path / "tokenizer")
    arguments = [f"tokenizer={tmp_path / 'tokenizer'}", *DATA, "dataset.im_size=16", "device=cpu"]
    assert latent_cache_main(["build", *arguments, f"out={tmp_path / 'cache'}"]) == 0
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert "stripes" in json.dumps(manifest)
