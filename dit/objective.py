"""The training objective of the generators: flow matching on latents, with its optional extra terms.

An objective is a module that holds the networks and maps (latents, labels, draws) to loss terms, so that wrappers for
several devices see one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from dit.config import DiTConfig
from dit.model import DiT
from ssdd.engine.random import batch_generator
from ssdd.losses.repa import RepaLoss
from ssdd.model.flow import interpolate, logit_normal_t, shift_time, uniform_t, velocity_target


@dataclass
class LatentDraws:
    """The random numbers of one step, for the whole global batch of B latents."""

    t: Tensor  # float32 [B] in [0, 1]
    eps: Tensor  # float32 [B, C, h, w]
    drop: Tensor  # bool [B], labels to replace by the null class

    def rows(self, part: slice) -> LatentDraws:
        return LatentDraws(self.t[part], self.eps[part], self.drop[part])


def step_draws(cfg: DiTConfig, step: int, shape: tuple[int, ...], device: torch.device) -> LatentDraws:
    """The draws of step `step` for latents [B, C, h, w]; a function of the seed and the step alone."""
    generator = batch_generator(device, cfg.seed, "dit.train", step)
    training, batch = cfg.training, shape[0]
    if training.t_sampling == "uniform":
        t = uniform_t(batch, generator)
    else:
        t = logit_normal_t(batch, generator, training.t_mean, training.t_std)
    eps = torch.randn(shape, generator=generator, device=device)
    drop = torch.rand(batch, generator=generator, device=device) < cfg.model.class_dropout
    return LatentDraws(shift_time(t, training.t_shift), eps, drop)


class LatentObjective(nn.Module):
    """Flow matching of `network`, in the convention that it has.

    direction: also the direction of the velocity (LightningDiT). repa: tokens after the first `repa_blocks` blocks are
    drawn towards its teacher's (Yu et al. 2024). `terms` lists the names of what is computed.
    """

    def __init__(self, network: DiT, direction: bool = False, repa: RepaLoss | None = None, repa_blocks: int = 0):
        super().__init__()
        self.network, self.direction, self.repa = network, direction, repa
        self.repa_blocks = None if repa is None else repa_blocks
        self.terms = ["velocity", *["direction"] * direction, *["repa"] * (repa is not None)]

    def forward(self, z: Tensor, y: Tensor, draws: LatentDraws, images: Tensor | None = None) -> dict[str, Tensor]:
        """Unweighted loss terms, float32 scalars, of normalised latents z [B, C, h, w] and labels y [B].

        images: what the latents were encoded from, float32 [B, 3, H, W] in [-1, 1], for REPA.
        """
        network, t = self.network, draws.t
        x_t = interpolate(z, draws.eps, t)
        inputs = network.convention.inputs(x_t, t)
        out, tokens = network(*inputs, torch.where(draws.drop, network.num_classes, y), self.repa_blocks), None
        if self.repa is not None:
            out, tokens = out
        v = network.convention.velocity(out[:, : network.in_channels].float(), x_t, t)
        target = velocity_target(z, draws.eps)
        terms = {"velocity": (v - target).square().mean()}
        if self.direction:
            terms["direction"] = direction_loss(v, target)
        if self.repa is not None:
            terms["repa"] = self.repa(tokens.unflatten(1, network.grid), images)
        return terms


def direction_loss(v: Tensor, target: Tensor) -> Tensor:
    """1 - cosine between velocities [B, C, h, w] as vectors of channels, the mean over positions (LightningDiT).

    Lengths below 0.1, a twentieth of usual ones, count as 0.1: a fresh network predicts 0, where a cosine's gradient
    has no bound, and would fill the first step and AdamW's second moments.
    """
    return 1 - cosine_similarity(v, target, dim=1, eps=0.1).mean()
