"""A block variant is one field of `dit.options.BlockVariants`: all that a user meets of it follows from the field."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dit.config import DiTConfig
from dit.foreign_checkpoints import load_dit
from dit.model import DiT
from dit.options import VARIANTS, BlockVariants, DiTOptions
from dit.tasks.build import architecture
from dit.tasks.train import run
from ssdd.engine.cli import parse
from ssdd.engine.schema_help import field_docs

ROOT = Path(__file__).resolve().parents[2]
NAMES = [variant.name for variant in fields(BlockVariants)]


def config(*argv: str) -> DiTConfig:
    return parse(DiTConfig, list(argv), program="dit", description="")


@pytest.mark.parametrize("name", NAMES)
def test_its_key_and_its_docstring_are_in_the_help_and_the_network_gets_it(name, capsys):
    with pytest.raises(SystemExit):
        config("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"model.{name} (bool; default false) {field_docs(BlockVariants)[name]}" in shown
    on = {variant: variant == name for variant in NAMES}
    assert architecture(config(f"model.{name}=true")).items() >= on.items()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_trains_with_it_records_it_and_loads_again(settings, name):
    cfg = settings(steps=2)
    setattr(cfg.model, name, True)
    assert run(cfg)["model"][name] is True
    model = DiT.from_pretrained(cfg.run_name, cfg.ckpt_dir)
    assert model.options.variants() == {variant: variant == name for variant in NAMES}
    again = load_dit(model.save_pretrained(f"{cfg.ckpt_dir}/again"))
    assert again.options == model.options


@pytest.mark.parametrize("name", NAMES)
def test_tensors_under_foreign_names_show_it(name, tmp_path):
    model = DiT.from_name("DiT-XXS/2", 8, num_classes=10, **{name: True})
    torch.save(model.state_dict(), tmp_path / "foreign.pt")
    assert load_dit(tmp_path / "foreign.pt", "sit").options.variants() == model.options.variants()
    assert [variant for variant, shown in VARIANTS.items() if shown(model.state_dict())] == [name]


SANDWICH = [
    (
        "options.py",
        "    def variants(self)",
        '''    sandwich: bool = _variant(lambda weights: "blocks.0.norm3.weight" in weights)
    """Normalise what attention adds."""

    def variants(self)''',
    ),
    (
        "layers.py",
        "        self.wo_shift = on.wo_shift\n",
        """        self.wo_shift = on.wo_shift
        self.norm3 = nn.LayerNorm(width) if on.sandwich else nn.Identity()
""",
    ),
    ("layers.py", "gate_attn.unsqueeze(1), attended)", "gate_attn.unsqueeze(1), self.norm3(attended))"),
]
"""File of `dit`, what stands there, and what stands there with one more variant."""

PROGRAM = """
import sys, torch
from dit.foreign_checkpoints import load_dit
from dit.main import main
from dit.model import DiT

assert main(sys.argv[3:]) == 0
model = DiT.from_pretrained(sys.argv[1], sys.argv[2])
torch.save(model.state_dict(), "foreign.pt")
assert model.options.sandwich and load_dit("foreign.pt", "sit").options.variants() == model.options.variants()
main(["--help"])
"""


def test_a_new_one_is_a_field_and_a_layer_and_all_else_follows(caches, tmp_path):
    shutil.copytree(ROOT / "dit", tmp_path / "dit", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in SANDWICH:
        source = (tmp_path / "dit" / name).read_text()
        assert source.count(old) == 1
        (tmp_path / "dit" / name).write_text(source.replace(old, new))
    keys = [f"cache={caches['mean']}", "run_name=run", "ckpt_dir=runs", "model.name=DiT-XXS/1", "model.sandwich=true"]
    keys += ["training.steps=1", "training.batch_size=4", "training.mixed_precision=no"]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, "run", "runs", *keys],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    shown = " ".join(ended.stdout.split())
    assert "model.sandwich (bool; default false) Normalise what attention adds." in shown
    assert json.loads((tmp_path / "runs/jobs/run/task_result.json").read_text())["model"]["sandwich"] is True


def test_options_are_values_that_can_not_be_changed():
    options = DiT.from_name("DiT-XXS/2", 8).options
    with pytest.raises(FrozenInstanceError):
        options.rope = True
    assert replace(options, rope=True) != options == replace(options, input_size=(8, 8))


def test_metadata_list_the_options_in_one_order_the_variants_last(tmp_path):
    file = DiT.from_name("DiT-XXS/2", (4, 8), 3, 6).save_pretrained(tmp_path)
    with safe_open(file, framework="pt") as handle:
        written = handle.metadata()["dit"]
    assert written == (
        '{"name": "DiT-XXS/2", "depth": 4, "width": 128, "heads": 2, "patch_size": 2, "input_size": [4, 8], '
        '"in_channels": 3, "num_classes": 6, "learn_sigma": true, "null_class": true, "time_scale": 1000.0, '
        '"convention": "flow", "qk_norm": false, "rms_norm": false, "swiglu": false, "rope": false, "wo_shift": false}'
    )
    assert DiTOptions(**json.loads(written)).to_dict() == json.loads(written)
