"""Distillation of a several-step decoder into one step (facts e, the corrected second version).

The teacher decodes the encoder's mean from noise n in S Euler steps to y; the student, started from the teacher's
weights, sees the same z and the same n at t = 1 and must reach y in one step: n + v(n, 1, z) = y.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssdd.flow import predict_data
from ssdd.objective import Draws
from ssdd.tokenizer import SSDD


class DistillationObjective(nn.Module):
    """Terms diffusion (mean squared error to the teacher's image) and lpips (to the same image); trains the decoder.

    student, teacher: tokenizers with equal encoders; the teacher is frozen here. teacher_steps: its Euler steps.
    """

    def __init__(self, student: SSDD, teacher: SSDD, teacher_steps: int, perceptual: nn.Module | None = None):
        super().__init__()
        self.tokenizer = student
        self.teacher = teacher.requires_grad_(False)
        self.teacher_steps = teacher_steps
        self.perceptual = perceptual
        self.terms = ["diffusion", "lpips"] if perceptual is not None else ["diffusion"]

    def forward(self, x: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Unweighted loss terms, float32 scalars, of images x [B, 3, H, W] in [-1, 1]; only `draws.eps` is used."""
        with torch.no_grad():
            z = self.teacher.encode(x).mode()
            target = self.teacher.decode(z, steps=self.teacher_steps, noise=draws.eps)
        t = torch.ones((), device=x.device)
        prediction = predict_data(draws.eps, self.tokenizer.decoder(draws.eps, t, z), t)
        terms = {"diffusion": (prediction - target).square().mean()}
        if self.perceptual is not None:
            terms["lpips"] = self.perceptual(prediction, target).mean()
        return terms
