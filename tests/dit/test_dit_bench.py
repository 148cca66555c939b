"""The speed comparison runs the trainer's step of equal networks and reports what it measured."""

from __future__ import annotations

import json

import pytest
import torch

from dit.model import DiT
from scripts.bench import main
from scripts.bench_dit import Diffusers, Settings, Step


def test_the_comparison_prints_a_table_and_one_line_of_json(capsys):
    assert main(["dit", "model=DiT-XXS/8", "batch=1", "rounds=1"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert (result["batch"], result["rounds"], result["dtype"], result["compile"]) == (1, 1, "float32", False)
    ours, theirs = (result["networks"]["DiT-XXS/8"][whose] for whose in ("ours", "diffusers"))
    assert result["networks"]["DiT-XXS/8"]["ratio"] == pytest.approx(theirs["median"] / ours["median"])
    assert ours["images_per_s"] == pytest.approx(1 / ours["median"])
    expected = DiT.from_name("DiT-XXS/8", learn_sigma=False)
    assert ours["parameters"] == sum(p.numel() for p in expected.parameters() if p.requires_grad)
    assert ours["gflop"] == pytest.approx(theirs["gflop"], rel=0.1)
    assert [row.split()[:2] for row in table[-3:-1]] == [["DiT-XXS/8", "ours"], ["DiT-XXS/8", "diffusers"]]


def test_diffusers_network_does_not_drop_labels_a_second_time():
    network = Diffusers(DiT.from_name("DiT-XXS/8", learn_sigma=False))
    Step(network, Settings(batch=1), torch.device("cpu"))
    assert not any(module.training for module in network.modules())


def test_a_wrong_setting_is_one_line_of_error(capsys):
    assert main(["dit", "dtype=float16"]) == 2
    assert "must be one of float32, bfloat16" in capsys.readouterr().err
