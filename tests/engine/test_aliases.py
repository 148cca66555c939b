"""Other names of keys: valid wherever a key is, absent from what is written, refused where they contradict."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest

from dit.config import DiTConfig
from ssdd.config import SSDDConfig
from ssdd.engine.checkpoint import save
from ssdd.engine.cli import parse, read_config
from ssdd.engine.errors import UserError
from ssdd.engine.run import RunDirectory
from ssdd.engine.schema import schema_aliases, schema_fields, to_yaml
from ssdd.engine.schema_help import help_text


@dataclass
class Training:
    parts: int = 1
    """Parts of a step."""
    betas: tuple[float, float] = (0.9, 0.999)
    decays: list[float] = field(default_factory=lambda: [0.99])


@dataclass
class Config:
    ALIASES: ClassVar[dict[str, str]] = {
        "training.accumulate": "training.parts",
        "beta2": "training.betas[1]",
        "average.first.decay": "training.decays[0]",
    }
    training: Training = field(default_factory=Training)


def read(*argv: str, schema: type = Config):
    return parse(schema, list(argv), program="prog", description="Does something.")


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*argv)
    return str(caught.value)


def test_another_name_sets_the_key_or_one_item_of_it():
    assert read("training.accumulate=4") == Config(Training(parts=4))
    assert read("beta2=0.95").training.betas == (0.9, 0.95)
    assert read("average.first.decay=0.5").training.decays == [0.5]
    assert read("average={first: {decay: 0.5}}").training.decays == [0.5]
    assert "training.accumulate expects int; got 'x'" in refusal("training.accumulate=x")
    assert "beta2 expects float; got 'x'" in refusal("beta2=x")


def test_names_of_one_key_may_agree_but_not_contradict_each_other(tmp_path):
    assert read("training.accumulate=4", "training.parts=4").training.parts == 4
    assert read("training.betas=[0.8,0.95]", "beta2=0.95").training.betas == (0.8, 0.95)
    for argv in (("training.accumulate=4", "training.parts=2"), ("beta2=0.9", "training.betas=[0.8,0.95]")):
        message = refusal(*argv)
        assert all(argument.partition("=")[0] in message for argument in argv) and "different values" in message
    (tmp_path / "old.yaml").write_text("training: {accumulate: 4, parts: 2}\n")
    assert "old.yaml, line 1: training.parts and training.accumulate set" in refusal(f"preset={tmp_path}/old.yaml")


def test_a_later_source_wins_whatever_the_names(tmp_path):
    (tmp_path / "old.yaml").write_text("training: {accumulate: 4}\nbeta2: 0.5\n")
    (tmp_path / "new.yaml").write_text("training: {parts: 8, betas: [0.1, 0.2]}\n")
    assert read(f"preset={tmp_path}/old.yaml", "training.parts=2").training == Training(2, (0.9, 0.5))
    assert read(f"preset={tmp_path}/new.yaml", "training.accumulate=2", "beta2=0.5").training == Training(2, (0.1, 0.5))


def test_files_and_hints_have_the_keys_own_names_and_the_help_has_all():
    cfg = read("training.accumulate=4")
    assert "parts: 4" in to_yaml(cfg) and "accumulate" not in to_yaml(cfg)
    assert refusal("training.accumulat=4").endswith("--help lists the keys")
    text = help_text(Config, "prog", "Does something.")
    assert "  training.parts  (int; default 1)\n      Parts of a step.\n      also: training.accumulate\n" in text
    assert "also: beta2 (item 1)" in text and "also: average.first.decay (item 0)" in text


def test_what_has_another_name_exists_and_is_a_value_in_both_programs():
    for schema in (SSDDConfig, DiTConfig):
        fields = schema_fields(schema)
        for name, (key, _) in schema_aliases(schema).items():
            assert name not in fields and fields[key].group is None


def test_both_programs_have_one_name_for_one_thing():
    published = read("ssdd.compile=false", "ssdd.ema.decay=0.9", "ssdd.ema.start_iter=7", schema=SSDDConfig)
    training = read("training.compile=false", "training.ema={decays: [0.9], start_iter: 7}", schema=SSDDConfig).training
    assert published.training == training
    earlier = read("training.accumulate=2", "training.beta2=0.95", "repa.i_extract=4", schema=DiTConfig)
    keys = ("training.grad_accumulate=2", "training.betas=[0.9,0.95]", "aux_losses.repa.i_extract=4")
    assert earlier == read(*keys, schema=DiTConfig)


OLD_CONFIGS = {
    SSDDConfig: """
ssdd: {compile: false, ema: {decay: 0.9, start_iter: 50000}, fm_trainer: {t_sampler_args: {t_mean: 0.4, t_std: 1.6}}}
training: {steps: 3, betas: [0.9, 0.99]}
""",
    DiTConfig: "training: {steps: 3, accumulate: 2, beta2: 0.95}\nrepa: {i_extract: 4, hidden: 32}\n",
}


@pytest.mark.parametrize("schema", OLD_CONFIGS)
def test_a_run_that_ended_under_earlier_names_is_found_finished(schema, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory("runs", "old")
    save(directory.last, {}, {"identity": {"seed": 0}, "step": 3})
    directory.write_result({"task": "train"})
    Path(directory.path / "config.yaml").write_text(OLD_CONFIGS[schema])
    cfg = read_config(schema, directory.path / "config.yaml")
    assert directory.finished(cfg, {"seed": 0}) == {"task": "train"}
    assert directory.finished(replace(cfg, seed=1), {"seed": 0}) is None
    directory.save_config(cfg)
    assert read_config(schema, directory.path / "config.yaml") == cfg
    assert directory.finished(cfg, {"seed": 0}) == {"task": "train"}
    with open(directory.path / "config.yaml", "a") as file:
        file.write("no_such_key: 1" + os.linesep)
    assert directory.finished(cfg, {"seed": 0}) is None
