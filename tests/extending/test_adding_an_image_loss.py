"""An image loss is one entry of a table: its keys, their help, training, the run's record and the report follow."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
from torch import Tensor, nn

import ssdd.config
from ssdd.engine.checkpoint import load_state
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.run import RunDirectory
from ssdd.engine.schema_help import help_text
from ssdd.losses.image_losses import IMAGE_LOSSES, LossEntry
from ssdd.tasks.train import run as train
from ssdd_pipeline.report.results import trained_on
from tests.small_tokenizer import ARGUMENTS


@dataclass
class EdgeOptions:
    """Edges."""

    reach: int = 1
    """Pixels between those that are compared."""


class EdgeDistance(nn.Module):
    def __init__(self, options: EdgeOptions):
        super().__init__()
        self.reach = options.reach

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        a, b = (x[..., self.reach :] - x[..., : -self.reach] for x in (images, targets))
        return (a - b).square().mean(dim=(1, 2, 3))


EDGES = LossEntry(
    EdgeDistance,
    weight=0.0,
    title="Edges",
    doc="Mean squared error of horizontal differences.",
    options=EdgeOptions,
    network="vit_{reach}",
)


@pytest.fixture
def module(monkeypatch) -> ModuleType:
    """`ssdd.config` as it is when the table has the loss: its dataclasses are made when it is imported."""
    monkeypatch.setitem(IMAGE_LOSSES, "edges", EDGES)
    monkeypatch.setattr(ssdd, "config", ssdd.config)
    monkeypatch.delitem(sys.modules, "ssdd.config")
    return importlib.import_module("ssdd.config")


@pytest.fixture
def config(module, tmp_path):
    """Makes a config of the small tokenizer."""

    def make(*arguments: str) -> object:
        own = [f"ckpt_dir={tmp_path}", "run_name=run", "training.steps=2", *arguments]
        return parse(module.SSDDConfig, [*ARGUMENTS, *own], program="ssdd", description="")

    return make


def test_the_help_documents_its_keys(module):
    text = help_text(module.SSDDConfig, "ssdd", "")
    assert "  losses.edges  (float; default 0.0)\n      Mean squared error of horizontal differences.\n" in text
    assert "  losses_start.edges  (int; default 0)\n      Edges.\n" in text
    assert "aux_losses.edges: Edges.\n  aux_losses.edges.reach  (int; default 1)\n      Pixels between" in text


def test_its_keys_are_checked_as_all_are(config):
    cfg = config("losses.edges=0.5", "aux_losses.edges.reach=2")
    assert (cfg.losses.edges, cfg.losses_start.edges, cfg.aux_losses.edges.reach) == (0.5, 0, 2)
    with pytest.raises(UserError, match="losses.edges expects float"):
        config("losses.edges=much")
    with pytest.raises(UserError, match="did you mean losses.edges"):
        config("losses.edge=1")


def test_it_trains_from_its_start_on_is_recorded_and_resumes(config, tmp_path):
    arguments = ("losses.edges=0.5", "losses_start.edges=1", "aux_losses.edges.reach=2")
    train(config(*arguments))
    first, second = RunDirectory(tmp_path, "run").read_metrics()
    assert "edges" not in first and second["edges"] > 0
    directory = RunDirectory(tmp_path, "run")
    assert load_state(directory.last)["identity"]["terms"] == ["diffusion", "edges"]
    assert trained_on("run", tmp_path / "jobs" / "eval") == {"vit_2"}
    assert train(config(*arguments, "training.steps=3"))["edges"] > 0
    with pytest.raises(UserError, match="terms was"):
        train(config("training.steps=4"))
