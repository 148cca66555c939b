"""A set metric takes one entry: help, config, results of all programs and tables follow."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dit.evaluation.tables import table
from ssdd.config import SSDDConfig
from ssdd.engine.cli import parse
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.schema_help import help_text
from ssdd.fidelity.command import main
from ssdd.fidelity.set_metrics import SET_METRICS, SetMetric
from ssdd.model.compared_decoders import Row
from ssdd.tasks.evaluate import Evaluator
from ssdd_pipeline.report.results import FinishedEvaluation
from ssdd_pipeline.report.tables import quality_table
from tests.small_tokenizer import ARGUMENTS

NETWORK = "efficientnet_lite0"


@pytest.fixture(autouse=True)
def way(monkeypatch) -> None:
    """A figure of moments alone: how far the means of a set and of the originals lie apart."""
    entry = SetMetric(lambda c: (c.row.mean - c.originals.mean).norm().item(), "{side}way to {FD}", 1, "↓")
    monkeypatch.setitem(SET_METRICS, "way", entry)


def test_a_new_set_metric_is_in_the_help_and_in_an_evaluation_and_its_report(tokenizer, tmp_path):
    assert "| way; default" in " ".join(help_text(SSDDConfig, "ssdd", "").split())
    argv = [*ARGUMENTS, f"evaluation.features=[{NETWORK}]", "evaluation.metrics=[way]", "dataset.limit=8"]
    cfg = parse(SSDDConfig, argv, program="ssdd", description="")
    evaluator = Evaluator(cfg, Processes(0, 1, torch.device("cpu")), Precision.float32("cpu"))
    result = evaluator.run([Row("tokenizer", tokenizer.eval(), 1)], reals=True)
    scores = result["rows"][0]["distances"][NETWORK]
    assert scores["way"] > 0 and result["floor"][NETWORK]["way"] > 0
    page = quality_table(FinishedEvaluation("run", tmp_path, {**result, "task": "eval"}), NETWORK)
    assert ("rway to FD", "↓") in [(column.label, column.better) for column in page.columns]
    lines = {"labels": "one", "reference": {"source": "digits", "crop": "adm"}, "notes": []}
    assert "gway to FD" in table({**result, **lines})


def test_a_new_set_metric_is_in_what_the_command_prints_and_writes(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for name in ("samples", "real"):
        (tmp_path / name).mkdir()
        for number in range(4):
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    out = tmp_path / "metrics.json"
    sets = [str(tmp_path / name) for name in ("samples", "real")]
    assert main([*sets, f"features={NETWORK}", f"out={out}", "cache="]) == 0
    (scores,) = json.loads(out.read_text())["metrics"][NETWORK].values()
    assert scores["way"] > 0
    assert re.search(rf"way to FD:? +{scores['way']:.6g}\n", capsys.readouterr().out)
