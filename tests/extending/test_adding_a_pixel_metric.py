"""A pixel metric takes one entry: help, config, results, the choice of the best checkpoint and tables follow."""

from __future__ import annotations

import pytest
import torch

from ssdd.config import SSDDConfig
from ssdd.engine.cli import parse
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.schema_help import help_text
from ssdd.fidelity.pixel_metrics import PIXEL_METRICS, PixelMetric
from ssdd.model.compared_decoders import Row
from ssdd.tasks.evaluate import Evaluator
from ssdd_pipeline.report.results import FinishedEvaluation
from ssdd_pipeline.report.tables import quality_table
from tests.small_tokenizer import ARGUMENTS


def shades(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Mean levels of images and originals: float64 [n, 2]."""
    return torch.stack([pixels.double().mean(dim=(1, 2, 3)) for pixels in (images, originals)], dim=1)


def test_a_new_pixel_metric_is_found_everywhere(monkeypatch, tokenizer, tmp_path):
    entry = PixelMetric(shades, "shade", 1, "↑", pool=lambda means: (means[0] / means[1]).item())
    monkeypatch.setitem(PIXEL_METRICS, "shade_ratio", entry)
    keys = " ".join(help_text(SSDDConfig, "ssdd", "").split())
    assert keys.count("| shade_ratio |") == 2  # of training.save_on_best and evaluation.metrics
    argv = [*ARGUMENTS, "evaluation.metrics=[shade_ratio]", "training.save_on_best=shade_ratio", f"ckpt_dir={tmp_path}"]
    cfg = parse(SSDDConfig, argv, program="ssdd", description="")
    evaluator = Evaluator(cfg, Processes(0, 1, torch.device("cpu")), Precision.float32("cpu"))
    result = evaluator.run([Row("tokenizer", tokenizer.eval(), 1)])
    row = result["rows"][0]
    assert evaluator.deciding(row, "shade_ratio") == ("shade_ratio", row["shade_ratio"])
    originals = evaluator.dataset.pixels(range(len(evaluator.dataset)))
    assert 0 < row["shade_ratio"] < 255 / originals.double().mean().item()
    row["distances"] = {"efficientnet_lite0": {}}
    table = quality_table(FinishedEvaluation("run", tmp_path, {**result, "task": "eval"}), "efficientnet_lite0")
    place = [(column.label, column.better) for column in table.columns].index(("shade", "↑"))
    assert table.rows[0][1][place].text == f"{row['shade_ratio']:.1f}"


def test_an_entry_without_a_direction_selects_no_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setitem(PIXEL_METRICS, "shades", PixelMetric(shades, "shades", 1))
    with pytest.raises(ValueError, match="shades"):
        parse(SSDDConfig, [*ARGUMENTS, "training.save_on_best=shades"], program="ssdd", description="")
