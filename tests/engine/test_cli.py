"""The configuration grammar, its order of precedence, its errors, and the help page."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import pytest

from ssdd.engine import presets, schema_help
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.files import plain
from ssdd.engine.schema import to_yaml


@dataclass
class Sampler:
    """How images are drawn."""

    steps: int = 8
    """Number of solver steps."""
    power: float = 2.0


@dataclass
class Gan:
    start_iter: int = 50_000
    weight: float = 1.0


@dataclass
class Training:
    lr: float = 8e-4
    """Learning rate."""
    epochs: Optional[int] = None  # noqa: UP045 - both spellings are in use
    compile: bool = True
    compile_loss: bool = "${training.compile}"  # type: ignore[assignment]


@dataclass
class Config:
    run_name: str = "run"
    """A unique name, which is also the name of the directory that everything this run writes goes to, so that a later
    run with the same name resumes it."""
    seed: int = 0
    source: str = field(default="digits", metadata={"choices": ("digits", "fashion_mnist")})
    """Where images come from."""
    metrics: list[str] = field(default_factory=list, metadata={"choices": ("psnr", "ssim")})
    decoders: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=lambda: [1, 8])
    root: str | None = None
    folder: Path | None = None
    size: int | str = 32
    weights: dict[str, float] = field(default_factory=dict)
    sampler: Sampler = field(default_factory=Sampler)
    training: Training = field(default_factory=Training)
    gan: Gan | None = None


@dataclass
class Required:
    out: str
    """Where to write."""
    count: int = 3


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    """A configs folder with two presets and one block."""
    (tmp_path / "presets" / "small").mkdir(parents=True)
    (tmp_path / "blocks").mkdir()
    (tmp_path / "presets" / "tiny.yaml").write_text("seed: 1\ntraining:\n  lr: 1e-3\n  epochs: 4\nsampler.steps: 3\n")
    (tmp_path / "presets" / "small" / "two.yaml").write_text("seed: 2\n")
    (tmp_path / "blocks" / "gan.yaml").write_text("gan: {start_iter: 10}\ntraining: {epochs: 5}\n")
    monkeypatch.setattr(presets, "configs_dir", lambda: tmp_path)
    return tmp_path


def read(*argv: str, schema: type = Config):
    return parse(schema, list(argv), program="prog", description="Does something.")


def refusal(*argv: str, schema: type = Config) -> str:
    with pytest.raises(UserError) as caught:
        read(*argv, schema=schema)
    return str(caught.value)


def test_no_arguments_give_the_defaults_as_dataclass_instances():
    assert read() == Config(training=Training(compile_loss=True))
    assert isinstance(read().sampler, Sampler)


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("seed=5_000", "seed", 5000),
        ("training.lr=1e-4", "training.lr", 1e-4),
        ("training.lr=2", "training.lr", 2.0),
        ("training.lr=.inf", "training.lr", math.inf),
        ("training.epochs=7", "training.epochs", 7),
        ("training.epochs=null", "training.epochs", None),
        ("training.compile=false", "training.compile", False),
        ("training.compile=True", "training.compile", True),
        ("run_name=2024_01", "run_name", "2024_01"),
        ("run_name=1e-4", "run_name", "1e-4"),
        ("run_name=no", "run_name", "no"),
        ("run_name=a=b: c", "run_name", "a=b: c"),
        ("run_name='quoted'", "run_name", "quoted"),
        ("run_name=", "run_name", ""),
        ("root=/data/[x] @1", "root", "/data/[x] @1"),
        ("root=null", "root", None),
        ("root='null'", "root", "null"),
        ("folder=/data/x", "folder", Path("/data/x")),
        ("steps=[1, 2,4]", "steps", [1, 2, 4]),
        ("steps=[]", "steps", []),
        ("decoders=[teacher:run@last:8,student:/a/b.safetensors:1]", "decoders", None),
        ('metrics=["psnr",ssim]', "metrics", ["psnr", "ssim"]),
        ("metrics=ssim", "metrics", ["ssim"]),  # one of a list's choices
        ("size=64", "size", 64),
        ("size=S", "size", "S"),
        ("weights={a: 1, b: 0.5}", "weights", {"a": 1.0, "b": 0.5}),
        ("weights.c=2", "weights", {"c": 2.0}),
        ("sampler={steps: 2}", "sampler", Sampler(steps=2)),
        ("gan.start_iter=5", "gan", Gan(start_iter=5)),
        ("gan={}", "gan", Gan()),
        ("training.lr=${sampler.power}", "training.lr", 2.0),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(argument, key, value):
    got = read(argument)
    for name in key.split("."):
        got = getattr(got, name)
    expected = ["teacher:run@last:8", "student:/a/b.safetensors:1"] if key == "decoders" else value
    assert got == expected
    assert type(got) is type(expected)


def test_later_sources_win():
    cfg = read("training.epochs=6", "+blocks=gan", "preset=tiny")
    assert (cfg.run_name, cfg.seed, cfg.sampler.steps) == ("run", 1, 3)
    assert cfg.training == Training(lr=1e-3, epochs=6, compile_loss=True)
    assert cfg.gan == Gan(start_iter=10)
    assert read("+blocks=gan", "preset=tiny").training.epochs == 5
    assert read("preset=small/two").seed == 2
    assert read("seed=1", "seed=2").seed == 2


def test_a_key_may_follow_another_until_it_is_set_itself():
    assert read("training.compile=false").training.compile_loss is False
    assert read("training.compile=false", "training.compile_loss=true").training.compile_loss is True


def test_the_saved_yaml_reads_back_as_a_preset_to_the_same_config(tmp_path):
    cfg = read(
        "run_name=1e-4",
        "root=null",
        "steps=[3]",
        "gan.weight=1e-7",
        "weights.a=0.1",
        "sampler.power=inf",
        "preset=tiny",
        "size='64'",
    )
    (tmp_path / "saved.yaml").write_text(to_yaml(cfg))
    assert read(f"preset={tmp_path / 'saved.yaml'}") == cfg
    assert plain(cfg)["gan"] == {"start_iter": 50_000, "weight": 1e-7}


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("sampler.step=4", "sampler.steps"),
        ("lr=4", "training.lr"),
        ("sampler.lr=4", "training.lr"),
        ("trainig.epochs=4", "training.epochs"),
        ("epoch=4", "training.epochs"),
        ("runname=4", "run_name"),
        ("sampler.steps.x=4", "sampler.steps"),
        ("gan.start=3", "gan.start_iter"),
    ],
)
def test_an_unknown_key_names_the_argument_and_the_nearest_valid_key(argument, nearest):
    message = refusal(argument)
    assert repr(argument) in message
    assert "unknown key" in message
    assert message.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("seed=5.5", "seed expects int; got '5.5'"),
        ("seed=true", "seed expects int; got 'true'"),
        ("seed=null", "seed expects int; got 'null'"),
        ("seed=", "seed expects int; got ''"),
        ("seed=[1]", "seed expects int; got [1]"),
        ("training.lr=fast", "training.lr expects float; got 'fast'"),
        ("training.epochs=x", "training.epochs expects int or null; got 'x'"),
        ("training.compile=3", "training.compile expects bool; got '3'"),
        ("steps=8", "steps expects list[int]; got '8'"),
        ("steps=[1,a]", "steps expects list[int]; got [1, a]"),
        ("steps={a: 1}", "steps expects list[int]; got {a: 1}"),
        ("weights.a=x", "weights.a expects float; got 'x'"),
        ("sampler=3", "sampler expects a group of keys: sampler.steps, sampler.power; got '3'"),
        ("sampler=null", "sampler expects a group of keys: sampler.steps, sampler.power; got 'null'"),
    ],
)
def test_a_wrong_type_names_the_key_the_expected_type_and_the_value(argument, expected):
    assert refusal(argument) == f"argument {argument!r}: {expected}"


def test_errors_in_files_name_the_file_and_the_line(configs):
    (configs / "presets" / "bad.yaml").write_text("seed: 1\ntraining:\n  epochs: 3\n  lrr: 0.1\n")
    assert refusal("preset=bad").startswith(f"{configs / 'presets' / 'bad.yaml'}, line 4: unknown key 'training.lrr'")
    assert "training.lr?" in refusal("preset=bad")
    (configs / "presets" / "bad.yaml").write_text("\nseed: soon\n")
    assert refusal("preset=bad") == f"{configs / 'presets' / 'bad.yaml'}, line 2: seed expects int; got 'soon'"
    (configs / "presets" / "bad.yaml").write_text("source: nothing\n")
    assert "bad.yaml, line 1: source must be one of" in refusal("preset=bad")
    (configs / "presets" / "bad.yaml").write_text("training:\n  lr: 1\n  lr: 2\n")
    assert "line 3: training.lr appears twice" in refusal("preset=bad")
    (configs / "presets" / "bad.yaml").write_text("seed: [1\n")
    assert "not valid YAML" in refusal("preset=bad")
    (configs / "presets" / "bad.yaml").write_text("- seed\n")
    assert "top level" in refusal("preset=bad")


def test_choices_are_a_tuple_a_table_or_a_function_and_follow_the_table():
    table = {"euler": 1}

    @dataclass
    class Config:
        solver: str = field(default="euler", metadata={"choices": table})
        other: str = field(default="none", metadata={"choices": lambda: ("none", *table)})

    with pytest.raises(UserError, match="solver must be one of euler; got 'heun'"):
        read("solver=heun", schema=Config)
    table["heun"] = 2
    cfg = read("solver=heun", "other=heun", schema=Config)
    assert (cfg.solver, cfg.other) == ("heun", "heun")
    assert "euler | heun" in schema_help.help_text(Config, "p", "d")


def test_a_value_outside_the_choices_lists_them():
    expected = "argument 'source=digit': source must be one of digits, fashion_mnist; got 'digit'; did you mean digits?"
    assert refusal("source=digit") == expected
    for argument in ("metrics=[psnr,fid]", "metrics=fid"):
        assert "metrics must be one of psnr, ssim; got 'fid'" in refusal(argument)


def test_an_unknown_preset_or_block_lists_what_there_is():
    assert "did you mean preset=tiny?" in refusal("preset=tini")
    assert "available: small/two, tiny" in refusal("preset=qqq")
    assert "did you mean +blocks=gan?" in refusal("+blocks=gann")


@pytest.mark.parametrize("argument", ["seed", "--seed=1", "++seed=1", "+seed=1", "~seed=1", "=3"])
def test_other_spellings_are_refused_with_the_right_one(argument):
    message = refusal(argument)
    assert repr(argument) in message
    assert "seed=1" in message or "expected key=value" in message


def test_broken_yaml_in_an_argument_is_refused():
    assert "not valid YAML" in refusal("steps=[1,")


def test_a_reference_to_no_key_is_refused():
    assert refusal("training.lr=${nowhere}").startswith("argument 'training.lr=${nowhere}': training.lr")


def test_a_field_without_default_must_be_given():
    assert read("out=x", schema=Required) == Required(out="x")
    assert refusal(schema=Required) == "out=... must be given (str); --help explains it"


def test_help_prints_every_key_with_its_docstring_and_exits(capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--help", "seed=1")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text == schema_help.help_text(Config, "prog", "Does something.") + "\n"
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "usage: prog" in text
    assert "Does something." in text
    assert "preset=tiny" in text
    assert "  source  (digits | fashion_mnist; default digits)\n      Where images come from.\n" in text
    assert "sampler: How images are drawn.\n  sampler.steps  (int; default 8)\n      Number of solver steps.\n" in text
    assert "training.epochs  (int or null; default null)" in text
    assert "steps  (list[int]; default [1, 8])" in text
    assert "gan.start_iter  (int; default 50000)" in text
    assert "run with the same name resumes it." in text
    assert "out  (str; required)\n      Where to write." in schema_help.help_text(Required, "p", "d")


def test_keys_of_inherited_schemas_keep_their_docstrings():
    text = schema_help.help_text(Longer, "p", "d")
    assert "      Learning rate.\n" in text
    assert "      More." in text


@dataclass
class Longer(Training):
    more: int = 1
    """More."""
