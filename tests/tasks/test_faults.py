"""What can go wrong in a run ends with one line that says what and where, and keeps what was there."""

from __future__ import annotations

import os
import subprocess

import pytest

from ssdd.engine.checkpoint import load
from ssdd.engine.errors import UserError
from ssdd.main import main
from ssdd.tasks.train import run
from tests.small_tokenizer import ARGUMENTS


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(config, tmp_path):
    arguments = ("training.optimizer=adamw", "training.steps=20", "training.grad_clip=0", "training.save_every=1")
    with pytest.raises(UserError, match=r"not finite at step \d+; .* keeps what came before"):
        run(config(*arguments, "training.lr=1e30"))
    tensors, state = load(tmp_path / "jobs" / "tokenizer" / "checkpoints" / "last")
    assert state["step"] >= 1
    assert all(tensor.isfinite().all() for tensor in tensors["model"].values())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_the_run_continues_when_there_is_space(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        arguments = [*ARGUMENTS, f"ckpt_dir={disk}", "run_name=run", "training.steps=3", "training.save_every=1"]
        assert main(arguments) == 2
        assert "no space left on the disk" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert main(arguments) == 0
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_of_one_class_trains(config, tmp_path, images_of_one_class):
    run(config("dataset.source=imagefolder", f"dataset.root={images_of_one_class}", "training.steps=1"))
    assert (tmp_path / "jobs" / "tokenizer" / "task_result.json").is_file()


@pytest.fixture
def images_of_one_class(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / "images" / split / "only").mkdir(parents=True)
        for i in range(9):
            Image.new("RGB", (20, 24), (i * 20, 0, 90)).save(tmp_path / "images" / split / "only" / f"{i}.png")
    return tmp_path / "images"
