"""The command line as users run it: by path from anywhere, with one-line errors before any work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssdd.config import SSDDConfig
from ssdd.engine.cli import parse
from ssdd.engine.presets import available
from ssdd.main import main
from tests.small_tokenizer import ARGUMENTS

ROOT = Path(__file__).resolve().parents[2]


def test_run_as_a_path_from_another_folder_it_names_the_unknown_key_and_exits_with_2(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    argv = [sys.executable, str(ROOT / "ssdd" / "main.py"), "trainin.steps=3"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "training.steps" in done.stderr and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["training.steps=many"], "training.steps"),
        (["ssdd.decoder=tiny"], "ssdd.decoder"),
        (["task=paint"], "task"),
        (["ssdd.encoder=f7c4"], "f7c4"),
        (["ssdd.checkpoint=never_trained"], "never_trained"),
        (["dataset.im_size=20"], "multiples of 8, got 20x20"),
        (["dataset.im_size=20", "ssdd.encoder=f4c2"], "multiples of 8, got 20x20"),
        (["dataset.source=imagefolder", "dataset.root=nowhere"], "nowhere"),
        (["training.steps=0"], "training.steps=0"),
        (["task=eval", "evaluation.features=[classifier:nowhere.safetensors]"], "ssdd.checkpoint"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments, named, tmp_path, capsys):
    assert main([*ARGUMENTS, f"ckpt_dir={tmp_path}", "run_name=run", *arguments]) == 2
    error = capsys.readouterr().err
    line = error.splitlines()[-1]
    assert line.startswith("error: ") and named in line and "Traceback" not in error


@pytest.mark.parametrize("preset", [name for name in available("presets") if name.startswith("ssdd/")])
def test_every_preset_reads(preset, tmp_path):
    cfg = parse(SSDDConfig, [f"preset={preset}"], program="ssdd", description="")
    assert cfg != SSDDConfig()


def test_blocks_add_to_presets():
    cfg = parse(SSDDConfig, ["preset=ssdd/sdvae", "+blocks=gan", "losses.lpips=0"], program="ssdd", description="")
    assert cfg.ssdd.encoder == "sdvae" and cfg.losses.gan_disc == 0.5 and cfg.gan.start_iter == 50_000
