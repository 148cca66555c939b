"""The speed comparison runs the trainer's step of equal networks and reports what it measured."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import dit as bench_dit
from bench.main import main
from dit.model import DiT

JOB = {"model": "DiT-XXS/8", "dtype": "float32", "compile": False, "batch": 1}
CPU = torch.device("cpu")


def test_the_comparison_prints_a_table_for_each_dtype_and_one_line_of_json(capsys, tmp_path, in_process):
    file = tmp_path / "speed.json"
    wanted = ["model=DiT-XXS/8", "batch=2", "rounds=1", "dtype=[float32,bfloat16]", f"json={file}"]
    assert main(["dit", *wanted]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result == json.loads(file.read_text())
    assert [(row["dtype"], row["compile"], row["batch"]) for row in result["rows"][::2]] == [
        ("float32", False, 2),
        ("bfloat16", False, 2),
    ]
    expected = DiT.from_name("DiT-XXS/8", learn_sigma=False)
    for ours, theirs in (result["rows"][:2], result["rows"][2:]):
        assert (ours["network"], theirs["network"], theirs["ratio"]) == ("ours", "diffusers", 1.0)
        assert ours["ratio"] == pytest.approx(theirs["median"] / ours["median"])
        assert ours["images_per_s"] == pytest.approx(2 / ours["median"])
        assert ours["parameters"] == sum(p.numel() for p in expected.parameters() if p.requires_grad)
        assert ours["gflop"] == pytest.approx(theirs["gflop"], rel=0.1)
        flop = 2e9 * ours["gflop"]
        assert ours["mfu"] == pytest.approx(flop / ours["median"] / result["peak_flops"][ours["dtype"]])
    rows = [row.split()[:2] for row in table if row.startswith("DiT-XXS/8")]
    assert [row[0] for row in rows] == ["DiT-XXS/8"] * 6
    assert [row[1] for row in rows if row[1] in ("ours", "diffusers")] == ["ours", "diffusers"] * 2


@pytest.mark.parametrize("network", ["ours", "diffusers"])
def test_flop_are_those_of_one_image_whatever_the_batch(network):
    one, two = (bench_dit.prepare(JOB | {"network": network, "batch": batch}, CPU).flop for batch in (1, 2))
    assert one == two > 0


def test_diffusers_network_does_not_drop_labels_a_second_time(monkeypatch):
    networks, build = [], bench_dit.build_objective

    def recorded(cfg, network):
        networks.append(network)
        return build(cfg, network)

    monkeypatch.setattr(bench_dit, "build_objective", recorded)
    bench_dit.prepare(JOB | {"network": "diffusers"}, CPU).stages["step"]()
    assert not any(module.training for module in networks[0].modules())


def test_without_diffusers_there_is_nothing_to_compare_with(capsys, monkeypatch, in_process):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["dit", "model=DiT-XXS/8", "batch=1", "rounds=1"]) == 2
    assert "pip install diffusers" in capsys.readouterr().err


def test_a_wrong_setting_is_one_line_of_error(capsys):
    assert main(["dit", "dtype=float16"]) == 2
    assert "must be one of float32, bfloat16" in capsys.readouterr().err
