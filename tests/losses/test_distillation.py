"""Distillation: what the student is compared with, what the draws reach, and who learns."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ssdd.losses.distillation import DistillationObjective
from ssdd.losses.image_losses import ImageLosses
from ssdd.losses.objective import TokenizerDraws
from ssdd.model.flow import interpolate

STEPS = 3


class Distance(nn.Module):
    """Stands for LPIPS, and keeps what it was given."""

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        self.images, self.originals = images, originals
        return (images - originals).abs().mean(dim=(1, 2, 3))


def draws(seed: int = 0, n: int = 3) -> TokenizerDraws:
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, 3, 16, 16), (n, 2, 2, 2)
    t, level = torch.rand(2, n, generator=generator)
    return TokenizerDraws(t, *(torch.randn(s, generator=generator) for s in shapes), level)


def moved(tokenizer):
    """A student that has left its teacher."""
    student = copy.deepcopy(tokenizer)
    with torch.no_grad():
        student.decoder.conv_out.weight.mul_(1.5)
    return student


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_both_terms_compare_with_the_image_that_the_teacher_decodes_from_the_same_mean_and_noise(tokenizer):
    student, distance, x, d = moved(tokenizer), Distance(), images(), draws()
    terms = DistillationObjective(student, tokenizer, STEPS, ImageLosses({"lpips": distance}))(x, d).terms
    z = tokenizer.encode(x).mode()
    target = tokenizer.decode(z, steps=STEPS, noise=d.eps)
    prediction = student.decode(z, steps=1, noise=d.eps)
    assert torch.allclose(distance.originals, target, atol=1e-5)
    assert torch.allclose(distance.images, prediction, atol=1e-5)
    assert torch.allclose(terms["diffusion"], (prediction - target).square().mean(), rtol=1e-4)
    assert torch.allclose(terms["lpips"], (prediction - target).abs().mean(), rtol=1e-4)


def test_neither_the_drawn_times_nor_the_posteriors_noise_matter(tokenizer):
    objective, x, d, other = DistillationObjective(moved(tokenizer), tokenizer, STEPS), images(), draws(), draws(1)
    assert objective.terms == ["diffusion"]
    loss = objective(x, d).terms["diffusion"]
    assert torch.equal(loss, objective(x, TokenizerDraws(other.t, d.eps, other.z_eps, other.level)).terms["diffusion"])
    assert not torch.equal(loss, objective(x, TokenizerDraws(d.t, other.eps, d.z_eps, d.level)).terms["diffusion"])


def test_the_decoder_of_the_student_alone_learns(tokenizer):
    student = moved(tokenizer)
    objective = DistillationObjective(student, tokenizer, STEPS, ImageLosses({"lpips": Distance()}))
    sum(objective(images(), draws()).terms.values()).backward()
    assert all(p.grad is None for p in tokenizer.parameters())
    assert all(p.grad is None for p in student.encoder.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.decoder.parameters())


def test_the_student_learns_at_the_noise_end_of_time_only(tokenizer):
    student, x, d = moved(tokenizer), images(), draws()
    times = []
    student.decoder.time_embedding.register_forward_pre_hook(lambda _, args: times.append(args[0].flatten().tolist()))
    inputs = []
    velocity = student.decoder.velocity_and_tokens
    student.decoder.velocity_and_tokens = lambda x_t, *rest: inputs.append(x_t) or velocity(x_t, *rest)
    DistillationObjective(student, tokenizer, STEPS)(x, d)
    assert times == [[1.0]]
    assert torch.equal(inputs[0], interpolate(x, d.eps, torch.ones(3)))
