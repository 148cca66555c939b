"""Distillation of a several-step decoder into one step, as in the second release of SSDD's code (2025-11-12).

The teacher decodes the encoder's mean from noise n in S Euler steps to y; the student, started from the teacher's
weights, sees the same z and the same n at t = 1 and must reach y in one step: n + v(n, 1, z) = y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssdd.losses.image_losses import ImageLosses, Terms
from ssdd.losses.objective import Losses, Predicted, TokenizerDraws, velocity_and_tokens
from ssdd.losses.repa import RepaLoss
from ssdd.model.flow import predict_data
from ssdd.model.latent import DiagonalGaussian
from ssdd.model.tokenizer import SSDD

LATENTS = ("mean", "sample", "noisy")


@dataclass(frozen=True)
class DistilledLatent:
    """Which latent teacher and student decode: the posterior's "mean" (paper), a "sample" of it, or "noisy".

    noisy: the mean plus tau * z_std * noise with tau uniform in [0, tau_max), since a generator's latents are not the
    encoder's means; z_std [c]: deviation of the latents.
    """

    kind: str = "mean"
    tau_max: float = 0.0
    z_std: Tensor | None = None

    def of(self, posterior: DiagonalGaussian, draws: TokenizerDraws) -> Tensor:
        """z [B, c, h, w]."""
        if self.kind == "sample":
            return posterior.sample(noise=draws.z_eps)
        if self.kind == "noisy":
            tau = self.tau_max * draws.level.view(-1, 1, 1, 1)
            return posterior.mode() + tau * self.z_std.view(-1, 1, 1) * draws.z_eps
        return posterior.mode()


class DistillationObjective(nn.Module):
    """Mean squared error to the teacher's image, image losses to the same image, REPA to the real one.

    student, teacher: tokenizers with equal encoders; the teacher is frozen here. teacher_steps: its Euler steps.
    latent: what both decode.
    """

    def __init__(
        self,
        student: SSDD,
        teacher: SSDD,
        teacher_steps: int,
        images: ImageLosses | None = None,
        repa: RepaLoss | None = None,
        repa_block: int = 0,
        latent: DistilledLatent | None = None,
    ):
        super().__init__()
        self.tokenizer, self.teacher = student, teacher.requires_grad_(False)
        self.teacher_steps, self.images = teacher_steps, images or ImageLosses()
        self.repa, self.repa_block = repa, repa_block
        self.latent = latent or DistilledLatent()
        self.terms = ["diffusion", *self.images.terms, *["repa"] * (repa is not None)]

    @torch.no_grad()
    def decoded(self, x: Tensor, draws: TokenizerDraws) -> tuple[Tensor, Tensor]:
        """z [B, c, h, w], and the teacher's image of it from the noise `draws.eps`."""
        z = self.latent.of(self.teacher.encode(x), draws)
        return z, self.teacher.decode(z, steps=self.teacher_steps, noise=draws.eps)

    def forward(
        self, x: Tensor, draws: TokenizerDraws, active: Terms = None, stored: tuple[Tensor, Tensor] | None = None
    ) -> Losses:
        """The losses of images x [B, 3, H, W] in [-1, 1]; `draws.t` is not used.

        stored: latents and teacher images made earlier from the same images and `draws.eps`.
        """
        z, target = self.decoded(x, draws) if stored is None else stored
        t = torch.ones((), device=x.device)
        keep = None if self.repa is None else self.repa_block
        v, tokens = velocity_and_tokens(self.tokenizer, draws.eps, t, z, keep)
        prediction = predict_data(draws.eps, v, t)
        terms = {"diffusion": (prediction - target).square().mean()}
        terms |= self.images(prediction, target, draws.eps, t, active)
        if self.repa is not None:
            terms["repa"] = self.repa(tokens, x) if active is None or "repa" in active else self.repa.idle()
        return Losses(terms, Predicted(prediction.detach(), draws.eps, t))
