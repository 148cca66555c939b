"""The training objective of the tokenizer: flow matching, LPIPS on the one-step prediction, KL (facts d).

An objective is a module that holds the networks and maps (images, draws) to loss terms, so that wrappers for several
devices see one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssdd.engine.noise import batch_generator
from ssdd.flow import interpolate, logit_normal_t, predict_data, velocity_target
from ssdd.tokenizer import SSDD


@dataclass
class Draws:
    """The random numbers of one training step, for the whole global batch of B images."""

    t: Tensor  # float32 [B] in [0, 1]
    eps: Tensor  # float32 [B, 3, H, W]
    z_eps: Tensor  # float32 [B, c, h, w], noise of the posterior sample

    def rows(self, part: slice) -> Draws:
        return Draws(self.t[part], self.eps[part], self.z_eps[part])


def step_draws(
    seed: int,
    step: int,
    image_shape: tuple[int, ...],
    latent_shape: tuple[int, ...],
    device: torch.device,
    t_mean: float = 0.0,
    t_std: float = 1.0,
) -> Draws:
    """The draws of step `step` for images [B, 3, H, W] and latents [B, c, h, w]; a function of seed and step alone."""
    generator = batch_generator(device, seed, "ssdd.train", step)
    return Draws(
        logit_normal_t(image_shape[0], generator, t_mean, t_std),
        torch.randn(image_shape, generator=generator, device=device),
        torch.randn(latent_shape, generator=generator, device=device),
    )


class FlowObjective(nn.Module):
    """Flow matching in pixel space given a sampled latent; trains the decoder, and the encoder unless it is frozen.

    weights: name -> weight of the terms diffusion, lpips, kl. lpips is computed where `perceptual` is given, kl where
    the encoder trains and its weight is not 0; `terms` lists the names of those that are.
    """

    def __init__(self, tokenizer: SSDD, weights: dict[str, float], perceptual: nn.Module | None = None):
        super().__init__()
        self.tokenizer = tokenizer
        self.perceptual = perceptual
        self.encoder_trains = any(p.requires_grad for p in tokenizer.encoder.parameters())
        used = {"diffusion": True, "lpips": perceptual is not None, "kl": self.encoder_trains and weights["kl"] != 0}
        self.terms = [name for name in used if used[name]]

    def forward(self, x: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Unweighted loss terms, float32 scalars, of images x [B, 3, H, W] in [-1, 1]."""
        with torch.set_grad_enabled(self.encoder_trains and torch.is_grad_enabled()):
            posterior = self.tokenizer.encode(x)
            z = posterior.sample(noise=draws.z_eps)
        x_t = interpolate(x, draws.eps, draws.t)
        v = self.tokenizer.decoder(x_t, draws.t, z)
        terms = {"diffusion": (v - velocity_target(x, draws.eps)).square().mean()}
        if "lpips" in self.terms:
            terms["lpips"] = self.perceptual(predict_data(x_t, v, draws.t), x).mean()
        if "kl" in self.terms:
            terms["kl"] = posterior.kl().mean()
        return terms


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The loss: every term times its weight."""
    return sum(weights[name] * value for name, value in terms.items())
