"""Every command of the published README, on a small folder of photographs and with random loss networks."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torchvision.models import vgg16

from ssdd.engine import pretrained as weights
from ssdd.engine.files import read_json
from ssdd.engine.run import RunDirectory
from ssdd.main import main

SMALL = (
    "ssdd.encoder_width=8 ssdd.decoder=XXS dataset.limit=8 dataset.im_size=64 dataset.batch_size=4 training.log_freq=1 "
    "dataset.workers=0 ssdd.compile=false aux_losses.repa.model=vit_tiny_patch16_224 training.optimizer=adamw"
)
TRAINING = {
    "train_enc_f8c4": "dataset.im_size=128 dataset.aug_scale=2 training.lr=1e-4 ssdd.encoder_train=true",
    "f8c4_M_pretrain": "dataset.im_size=128 dataset.aug_scale=2 ssdd.encoder_checkpoint=train_enc_f8c4",
    "f8c4_M_128": "training.epochs=200 dataset.im_size=128 training.lr=1e-4 ssdd.checkpoint=f8c4_M_pretrain",
    "f8c4_M_256": "training.epochs=200 dataset.im_size=256 training.lr=1e-4 ssdd.checkpoint=f8c4_M_pretrain",
    "f8c4_M_128_distill": "training.epochs=10 training.eval_freq=1 dataset.im_size=128 training.lr=1e-4 "
    "ssdd.checkpoint=f8c4_M_128 ssdd.fm_sampler.steps=7 distill_teacher=true",
    "with_gan": "dataset.im_size=128 +blocks=gan gan.start_iter=2",
}
STEPS = 7


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """An image folder of 2 classes, crops of scikit-learn's two photographs."""
    folder = tmp_path_factory.mktemp("images")
    for name, picture in zip(("china", "flower"), load_sample_images().images, strict=True):
        for split, count in (("train", 6), ("val", 4)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                crop = Image.fromarray(picture).crop((90 * i, 40 * i, 90 * i + 160, 40 * i + 150))
                crop.save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def random_networks(tmp_path, monkeypatch):
    """VGG and a vision transformer with random weights, where the search path finds them."""
    torch.manual_seed(0)
    entry = weights.PRETRAINED["vgg16"]
    monkeypatch.setitem(weights.PRETRAINED, "vgg16", replace(entry, sha256=""))
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    with torch.device("meta"):  # of 138 million weights LPIPS reads the 15 million of the convolutions
        convolutions = vgg16(init_weights=False).features
    for layer in convolutions.to_empty(device="cpu"):
        if isinstance(layer, torch.nn.Conv2d):  # as torchvision draws them
            torch.nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            torch.nn.init.zeros_(layer.bias)
    torch.save({f"features.{k}": v for k, v in convolutions.state_dict().items()}, tmp_path / entry.filename)
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit_tiny_patch16_224.safetensors")


def test_every_stage_evaluation_and_statistics_of_the_published_readme(photographs, random_networks, tmp_path):
    def run(command: str, *more: str) -> None:
        arguments = ["ssdd.fm_sampler.steps=2", *shlex.split(command), *shlex.split(SMALL), *more]
        arguments += [f"dataset.imagenet_root={photographs}"]
        assert main([*arguments, f"ckpt_dir={tmp_path / 'runs'}"]) == 0, command

    for name, command in TRAINING.items():
        rate = 1e-4 if name.endswith("distill") else 1e-3  # a few steps of a small network need more than 1e-4
        run(f"run_name={name} {command}", f"training.steps={STEPS}", f"training.lr={rate}")
        directory = RunDirectory(tmp_path / "runs", name)
        lines = directory.read_metrics()
        losses = [line["diffusion"] for line in lines if "diffusion" in line]
        assert len(losses) == STEPS and {"lpips", "repa"} <= set(lines[0])
        assert sum(losses[-2:]) < 0.85 * sum(losses[:2]), (name, losses)
        if name == "with_gan":
            values = [line.get("gan_train", 0) for line in lines if "diffusion" in line]
            assert values[:2] == [0, 0] and all(value > 0 for value in values[2:])
        for part in ("last/model.safetensors", "last/model_ema.safetensors", "best/state.json"):
            assert (directory.checkpoints / part).is_file(), (name, part)
    for name, steps in (("f8c4_M_128", 8), ("f8c4_M_128_distill", 1)):
        run(f"task=eval run_name=eval_{name} dataset.im_size=128 ssdd.checkpoint={name} ssdd.fm_sampler.steps={steps}")
        row = read_json(tmp_path / "runs" / "jobs" / f"eval_{name}" / "task_result.json")["rows"][0]
        assert row["steps"] == steps and row["PSNR"] > 5
    run("task=z_stats run_name=stats ssdd.compile=false ssdd.encoder_checkpoint=train_enc_f8c4")
    assert set(read_json(tmp_path / "runs" / "jobs" / "stats" / "task_result.json")) == {"z_mean", "z_std", "precision"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate launch --cpu --num_processes 1", "torchrun --standalone", "python"])
def test_every_launcher_runs_the_program_by_its_path(launcher, photographs, tmp_path):
    script = Path(__file__).resolve().parents[2] / "ssdd" / "main.py"
    command = f"{launcher} {script} run_name=run training.steps=2 {SMALL} losses.lpips=0 losses.repa=0"
    arguments = [*shlex.split(command), f"dataset.imagenet_root={photographs}", f"ckpt_dir={tmp_path}"]
    arguments[0] = str(Path(sys.executable).parent / arguments[0])
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert RunDirectory(tmp_path, "run").result.is_file()
