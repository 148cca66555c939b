"""The training objectives: closed values, and gradients that reach the right networks only."""

from __future__ import annotations

import copy

import torch

from ssdd.losses.distillation import DistillationObjective
from ssdd.losses.image_losses import ImageLosses
from ssdd.losses.objective import TokenizerDraws, TokenizerFlowObjective, step_draws, weighted_sum
from ssdd.model.flow import euler, time_grid
from ssdd.tasks.train import active_terms

WEIGHTS = {"diffusion": 1.0, "lpips": 0.0, "kl": 1e-6}


def small_draws(n: int = 3) -> TokenizerDraws:
    return step_draws(0, 5, (n, 3, 16, 16), (n, 2, 2, 2), torch.device("cpu"))


def images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_draws_are_a_function_of_seed_and_step_and_rows_are_slices():
    one, again = small_draws(), small_draws()
    assert torch.equal(one.eps, again.eps) and torch.equal(one.t, again.t)
    assert torch.equal(one.rows(slice(1, 3)).z_eps, one.z_eps[1:])
    assert not torch.equal(one.eps, step_draws(0, 6, (3, 3, 16, 16), (3, 2, 2, 2), torch.device("cpu")).eps)


def test_flow_terms_equal_their_definitions(tokenizer):
    x, draws = images(), small_draws()
    terms = TokenizerFlowObjective(tokenizer)(x, draws).terms
    posterior = tokenizer.encode(x)
    z = posterior.mean + posterior.std * draws.z_eps
    t = draws.t.view(-1, 1, 1, 1)
    v = tokenizer.decoder((1 - t) * x + t * draws.eps, draws.t, z)
    assert torch.allclose(terms["diffusion"], (v - (x - draws.eps)).square().mean())
    assert torch.allclose(terms["kl"], posterior.kl().mean())
    assert torch.allclose(weighted_sum(terms, WEIGHTS), terms["diffusion"] + 1e-6 * terms["kl"])


def test_a_frozen_encoder_gets_no_gradient_and_no_kl(tokenizer):
    tokenizer.encoder.requires_grad_(False)
    terms = TokenizerFlowObjective(tokenizer)(images(), small_draws()).terms
    assert list(terms) == ["diffusion"]
    terms["diffusion"].backward()
    assert all(p.grad is None for p in tokenizer.encoder.parameters())
    assert all(p.grad is not None for p in tokenizer.decoder.parameters())


def test_a_trained_encoder_gets_gradients_through_the_sampled_latent(tokenizer):
    TokenizerFlowObjective(tokenizer, with_kl=False)(images(), small_draws()).terms["diffusion"].backward()
    assert tokenizer.encoder.out_proj.weight.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_distillation_is_the_distance_to_the_teachers_euler_image_from_the_same_noise(tokenizer):
    student = copy.deepcopy(tokenizer)
    with torch.no_grad():
        for parameter in student.decoder.parameters():
            parameter.mul_(1.01)
    x, draws = images(), small_draws()
    terms = DistillationObjective(student, tokenizer, teacher_steps=3)(x, draws).terms
    with torch.no_grad():
        z = tokenizer.encode(x).mean
        target = euler(lambda x_t, t: tokenizer.decoder(x_t, t, z), draws.eps, time_grid(3))
        prediction = draws.eps + student.decoder(draws.eps, 1.0, z)
    assert torch.allclose(terms["diffusion"], (prediction - target).square().mean(), rtol=1e-4)
    terms["diffusion"].backward()
    assert all(p.grad is None for p in tokenizer.parameters())


def test_a_student_that_is_its_one_step_teacher_has_no_loss(tokenizer):
    terms = DistillationObjective(copy.deepcopy(tokenizer), tokenizer, teacher_steps=1)(images(), small_draws()).terms
    assert terms["diffusion"] < 1e-10


class Difference(torch.nn.Module):
    """Stands for LPIPS: distances [B] of images."""

    calls = 0

    def forward(self, images, originals):
        self.calls += 1
        return (images - originals).abs().mean(dim=(1, 2, 3))


def test_an_image_loss_reaches_the_decoder_and_is_computed_while_it_is_active_only(tokenizer):
    lpips = Difference()
    objective = TokenizerFlowObjective(tokenizer, ImageLosses({"lpips": lpips}), with_kl=False)
    assert objective.terms == ["diffusion", "lpips"]
    assert set(objective(images(), small_draws(), active=["diffusion"]).terms) == {"diffusion"} and lpips.calls == 0
    objective(images(), small_draws(), active=["diffusion", "lpips"]).terms["lpips"].backward()
    assert lpips.calls == 1 and tokenizer.decoder.conv_out.weight.grad.any()


def test_terms_are_active_from_their_start_on(config):
    cfg = config("losses_start.lpips=2", "losses_start.repa=3", "gan.start_iter=4")
    terms = ["diffusion", "lpips", "repa", "gan_disc", "kl"]
    assert [len(active_terms(cfg, terms, step)) for step in range(6)] == [2, 2, 3, 4, 5, 5]
    assert active_terms(cfg, terms, 3) == ["diffusion", "lpips", "repa", "kl"]
