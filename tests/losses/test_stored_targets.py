"""Stored targets: the teacher's own images, made once, continued after an interruption, used by training."""

from __future__ import annotations

import pytest
import torch

from ssdd.engine.errors import UserError
from ssdd.engine.run import RunDirectory
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8
from ssdd.images.sources import open_source
from ssdd.losses.stored_targets import SHARD, TargetStore
from ssdd.tasks.train import run

CACHED = ("ssdd.checkpoint=teacher", "distill_teacher=true", "distill.targets=cache", "training.optimizer=adamw")


@pytest.fixture
def dataset(config):
    cfg = config(f"dataset.limit={SHARD + 8}").dataset
    return ImageDataset(open_source(cfg, "train"), cfg, train=False)


def test_a_row_is_what_the_teacher_decodes_from_its_noise(tokenizer, dataset, tmp_path):
    store = TargetStore(tmp_path, "some teacher", len(dataset), noises=2, seed=0)
    store.build(dataset, tokenizer, steps=2, rank=0, world=1)
    indices = torch.tensor([3, SHARD + 5, 0])
    for draw in (0, 1, 2):
        z, target = store.gather(indices, draw)
        x = torch.stack([from_uint8(dataset[int(i)][0]) for i in indices])
        noise = store.noise(indices, draw, (3, 16, 16))
        assert torch.allclose(z, tokenizer.encode(x).mode(), atol=1e-5)
        assert (target - tokenizer.decode(z, steps=2, noise=noise)).abs().max() < 5e-3  # kept in float16
    assert not torch.equal(store.gather(indices, 0)[1], store.gather(indices, 1)[1])
    assert torch.equal(store.gather(indices, 0)[1], store.gather(indices, 2)[1])


def test_processes_and_interruptions_leave_the_same_bytes(tokenizer, dataset, tmp_path):
    whole = TargetStore(tmp_path / "whole", "teacher", len(dataset), noises=2, seed=0)
    whole.build(dataset, tokenizer, 2, 0, 1)
    parts = TargetStore(tmp_path / "parts", "teacher", len(dataset), noises=2, seed=0)
    parts.build(dataset, tokenizer, 2, 0, 2)
    parts.build(dataset, tokenizer, 2, 1, 2)
    assert len(list(parts.folder.iterdir())) == 4
    (parts.folder / "00000002.safetensors").unlink()
    kept = (parts.folder / "00000001.safetensors").stat().st_mtime_ns
    parts.build(dataset, tokenizer, 2, 0, 1)
    assert (parts.folder / "00000001.safetensors").stat().st_mtime_ns == kept
    for path in whole.folder.iterdir():
        assert path.read_bytes() == (parts.folder / path.name).read_bytes()


def test_distillation_from_stored_targets_learns_and_is_another_run_than_online(config, tmp_path):
    run(config("training.steps=2", "run_name=teacher", "ssdd.encoder_train=true"))
    run(config(*CACHED, "training.steps=10", "training.lr=3e-3", "distill.noises=2"))
    losses = [line["diffusion"] for line in RunDirectory(tmp_path, "tokenizer").read_metrics()]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(UserError, match="not for distill.z=noisy"):
        run(config(*CACHED, "run_name=other", "distill.z=noisy"))


def test_targets_of_another_encoder_are_others_and_a_run_keeps_its_way_of_distilling(config, tmp_path):
    run(config("training.steps=2", "run_name=teacher", "ssdd.encoder_train=true"))
    run(config("training.steps=2", "run_name=other", "ssdd.encoder_train=true", "seed=1"))
    run(config(*CACHED, "training.steps=2", "training.save_every=1"))
    run(config(*CACHED, "training.steps=2", "run_name=replaced", "ssdd.encoder_checkpoint=other"))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with pytest.raises(UserError, match="distill was"):
        run(config(*CACHED, "training.steps=2", "distill.targets=online"))
