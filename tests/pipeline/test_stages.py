"""The commands of the stages."""

from __future__ import annotations

import pytest

from dit.config import DiTConfig
from ssdd.config import SSDDConfig
from ssdd_pipeline.stages import PipelineConfig, build_stages, last_names


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"training.compile": True, "ssdd.compile": False}, {"ssdd.compile": False}),
        ({"ssdd.compile": False, "training.compile": True}, {"training.compile": True}),
        ({"training.betas": [0.9, 0.95], "training.lr": 1e-4}, {"training.betas": [0.9, 0.95], "training.lr": 1e-4}),
    ],
)
def test_the_last_name_of_a_key_wins(settings, last):
    assert last_names(SSDDConfig, settings) == last


def test_an_item_of_a_list_replaces_it_in_an_earlier_list_and_goes_with_a_later_one():
    both = {"training.betas": [0.9, 0.95], "training.beta2": 0.99}
    assert last_names(DiTConfig, both) == {"training.betas": [0.9, 0.99]}
    assert last_names(DiTConfig, dict(reversed(both.items()))) == {"training.betas": [0.9, 0.95]}
    assert last_names(DiTConfig, {"training.beta2": 0.99}) == {"training.beta2": 0.99}


def test_a_student_s_setting_under_an_earlier_name_wins_over_the_tokenizer_s():
    cfg = PipelineConfig("demo")
    cfg.tokenizer = {"training": {"compile": True, "grad_accumulate": 2}}
    cfg.student = {"ssdd": {"compile": False}}
    stages = {stage.name: stage.arguments for stage in build_stages(cfg)}
    assert "training.compile=true" in stages["tokenizer"]
    assert "ssdd.compile=false" in stages["student"] and "training.compile=true" not in stages["student"]
    assert "training.grad_accumulate=2" in stages["student"]
