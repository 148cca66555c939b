"""What a tokenizer's training step reads: images, the step's draws, and stored targets of a distillation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssdd.config import SSDDConfig
from ssdd.engine.devices import to_device
from ssdd.engine.errors import UserError
from ssdd.engine.processes import Processes
from ssdd.engine.training_checks import parts_of, rows_a_process
from ssdd.images.batches import steps_per_epoch, train_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import open_source
from ssdd.losses.distillation import DistillationObjective
from ssdd.losses.objective import TokenizerDraws, step_draws
from ssdd.losses.stored_targets import TargetStore
from ssdd.model.tokenizer import SSDD


@dataclass
class TrainingBatch:
    """One process's rows of a step, on its device."""

    x: Tensor  # float32 [b, 3, H, W]
    draws: TokenizerDraws
    targets: tuple[Tensor, Tensor] | None  # latents [b, c, h, w] and teacher images [b, 3, H, W], where they are stored

    def rows(self, part: slice) -> tuple[Tensor, TokenizerDraws, list[tuple[Tensor, Tensor]]]:
        """Images and draws of a part, and its stored targets, one pair or none: what the objective takes."""
        stored = [] if self.targets is None else [(self.targets[0][part], self.targets[1][part])]
        return self.x[part], self.draws.rows(part), stored


class TrainingImages:
    """The training images of a config, and how many steps they make.

    rows: of a step that this process gets, in `parts`. steps: of the whole run. UserError for a batch that cannot be
    divided.
    """

    def __init__(self, cfg: SSDDConfig, processes: Processes):
        self.cfg, self.processes, self.batch_size = cfg, processes, cfg.dataset.batch_size
        self.rows = rows_a_process("dataset.batch_size", self.batch_size, processes.world, cfg.training.grad_accumulate)
        self.parts = parts_of(self.rows, cfg.training.grad_accumulate)
        self.stored = cfg.distill_teacher and cfg.distill.targets == "cache"  # then every epoch sees the same crops
        source = open_source(cfg.dataset, "train")
        self.dataset = ImageDataset(source, cfg.dataset, train=not self.stored, seed=cfg.seed)
        self.epoch_steps = steps_per_epoch(self.dataset, self.batch_size)
        training = cfg.training
        self.steps = training.epochs * self.epoch_steps if training.steps is None else training.steps
        self.targets: TargetStore | None = None

    def store_targets(self, objective: DistillationObjective, teacher: Any) -> None:
        """Make the stored targets complete, if the config wants any and is not of a dry run.

        teacher: checksums of its weights.

        UserError for latents other than the posterior's mean.
        """
        if not self.stored:
            return
        cfg, dataset = self.cfg, self.dataset
        if cfg.distill.z != "mean":
            raise UserError(f"distill.targets=cache stores the posterior's mean: not for distill.z={cfg.distill.z}")
        if cfg.dry_run:
            return
        steps, sampler = cfg.ssdd.fm_sampler.steps, vars(cfg.ssdd.fm_sampler)
        identity = {"teacher": teacher, "sampler": sampler, "data": dataset.source.fingerprint()}
        identity |= {"im_size": cfg.dataset.im_size, "crop": cfg.dataset.crop}
        self.targets = TargetStore(Path(cfg.ckpt_dir) / "cache", identity, len(dataset), cfg.distill.noises, cfg.seed)
        self.targets.build(dataset, objective.teacher, steps, self.processes.rank, self.processes.world)
        self.processes.wait()

    def read(self, start: int) -> Iterator[Any]:
        """Endless batches of this process, decoded on the host, from step `start` on."""
        rank, world, workers = self.processes.rank, self.processes.world, self.cfg.dataset.reading_processes
        return train_batches(self.dataset, self.batch_size, self.cfg.seed, start, rank, world, workers)

    def made_up(self, network: SSDD) -> TrainingBatch:
        """The first step's batch with random images, and zeros as stored latents: what a dry run measures with."""
        side = self.cfg.dataset.im_size
        batch = self.batch((torch.rand(self.rows, 3, side, side) * 2 - 1, None, None, 0), 0, network)
        if self.stored:
            batch.targets = torch.zeros_like(batch.draws.z_eps), batch.x
        return batch

    def batch(self, read: Any, step: int, network: SSDD) -> TrainingBatch:
        """What was `read` for a step of `network`, on the device, with the step's draws."""
        (x, _, indices, epoch), device = read, self.processes.device
        times = self.cfg.training
        shapes = (
            (self.batch_size, *x.shape[1:]),
            (self.batch_size, network.z_dim, *(side // network.f for side in x.shape[2:])),
        )
        draws = step_draws(self.cfg.seed, step, *shapes, device, times.t_mean, times.t_std)
        draws = draws.rows(self.processes.own(self.rows))
        targets = None
        if self.targets is not None:
            draws = replace(draws, eps=self.targets.noise(indices, epoch, tuple(x.shape[1:])).to(device))
            z, images = self.targets.gather(indices, epoch)
            targets = to_device(z, device), to_device(images, device)
        x = to_device(x, device).contiguous(memory_format=torch.channels_last)
        return TrainingBatch(x, draws, targets)
