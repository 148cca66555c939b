"""The terms of the training objective equal their definitions, reach what they should, and cost nothing when off."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dit.config import DiTConfig
from dit.model import DiT
from dit.objective import LatentDraws, LatentObjective, direction_loss, step_draws
from dit.tasks.build import build_objective
from ssdd.engine.errors import UserError
from ssdd.losses.repa import RepaLoss
from ssdd.model.flow import interpolate, shift_time, time_grid


class Teacher(nn.Module):
    """Tokens of two numbers: 1, 0 everywhere."""

    dim = 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(images), 4, 4, 2)


@pytest.fixture
def network() -> DiT:
    """A network with an output: fresh ones give zero."""
    torch.manual_seed(0)
    model = DiT.from_name("DiT-XXS/1", 4, 2, 10, learn_sigma=False)
    for name, parameter in model.named_parameters():
        if "adaLN" in name or "final_layer" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def draws(drop: bool = False) -> LatentDraws:
    generator = torch.Generator().manual_seed(1)
    t, eps = torch.tensor([0.2, 0.5, 0.9]), torch.randn(3, 2, 4, 4, generator=generator)
    return LatentDraws(t, eps, torch.full((3,), drop))


Z, Y = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 4, 9])


def test_the_velocity_term_is_the_squared_error_of_the_velocity_from_data_to_noise(network):
    d = draws()
    terms = LatentObjective(network)(Z, Y, d)
    out = network(interpolate(Z, d.eps, d.t), 1000 * d.t, Y)
    assert list(terms) == ["velocity"]
    torch.testing.assert_close(terms["velocity"], ((out - (Z - d.eps)) ** 2).mean())


def test_dropped_labels_are_those_of_the_null_class(network):
    dropped, null = LatentObjective(network)(Z, Y, draws(drop=True)), LatentObjective(network)(Z, Y * 0 + 10, draws())
    assert torch.equal(dropped["velocity"], null["velocity"])


def test_a_network_of_another_convention_has_the_same_loss(network):
    """REPA's networks see t and predict noise - data: the same function with the sign and the clock of theirs."""
    other = DiT(**{**network.config, "convention": "repa"})
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        other.final_layer.linear.weight.neg_()
        other.final_layer.linear.bias.neg_()
    assert torch.equal(
        LatentObjective(other)(Z, Y, draws())["velocity"], LatentObjective(network)(Z, Y, draws())["velocity"]
    )


def test_the_direction_term_is_0_along_1_across_and_2_against_whatever_the_lengths():
    x = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).expand(2, 2, 4, 4)
    assert direction_loss(7 * x, x).item() == pytest.approx(0, abs=1e-6)
    assert direction_loss(x.flip(1), x).item() == pytest.approx(1)
    assert direction_loss(-0.1 * x, x).item() == pytest.approx(2)
    half = torch.cat([x[:1], -x[:1]])  # a mean over samples and positions, not a cosine of the whole batch
    assert direction_loss(half, x).item() == pytest.approx(1)


def test_the_direction_term_reaches_every_weight(network):
    LatentObjective(network, direction=True)(Z, Y, draws())["direction"].backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.requires_grad)


def test_a_fresh_network_which_predicts_zero_gets_a_gradient_of_usual_size():
    fresh = DiT.from_name("DiT-XXS/1", 4, 2, 10, learn_sigma=False)
    norms = {}
    for term, loss in LatentObjective(fresh, direction=True)(Z, Y, draws()).items():
        (gradient,) = torch.autograd.grad(loss, fresh.final_layer.linear.weight, retain_graph=True)
        norms[term] = gradient.norm()
    assert 0 < norms["direction"] < 20 * norms["velocity"]


def test_repa_compares_the_tokens_after_its_block_and_reaches_nothing_behind(network):
    objective = LatentObjective(network, repa=RepaLoss(128, Teacher(), layers=3, hidden=32), repa_blocks=2)
    assert objective.terms == ["velocity", "repa"]
    widths = [m.in_features for m in objective.repa.repa_mlp if isinstance(m, nn.Linear)]
    assert widths == [128, 32, 32]
    d, images = draws(), torch.zeros(3, 3, 32, 32)
    terms = objective(Z, Y, d, images)
    terms["repa"].backward()
    assert all(p.grad.any() for p in objective.repa.repa_mlp.parameters())
    assert network.blocks[1].attn.qkv.weight.grad.any() and network.blocks[2].attn.qkv.weight.grad is None
    assert network.final_layer.linear.weight.grad is None
    _, tokens = network(interpolate(Z, d.eps, d.t), 1000 * d.t, Y, 2)
    projected = objective.repa.repa_mlp(tokens)
    torch.testing.assert_close(terms["repa"], 1 - (projected[..., 0] / projected.norm(dim=-1)).mean())


def test_keeping_tokens_changes_no_output(network):
    t = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(network(Z, t, Y, 4)[0], network(Z, t, Y))


def test_a_weight_of_zero_builds_nothing(network, monkeypatch):
    monkeypatch.setattr("dit.tasks.build.PatchTokens", lambda *_: pytest.fail("built"))
    objective = build_objective(DiTConfig(), network)
    assert objective.terms == ["velocity"] and objective.repa is None
    assert {id(p) for p in objective.parameters()} == {id(p) for p in network.parameters()}


def test_a_block_that_the_network_does_not_have_is_refused_with_those_it_has(network):
    cfg = DiTConfig()
    cfg.losses.repa = 0.5
    with pytest.raises(UserError, match=r"repa.i_extract=8: .* blocks 1 to 4"):
        build_objective(cfg, network)


def test_shifted_times_keep_their_ends_and_their_order_and_move_as_the_grid_of_sampling_does():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert torch.equal(shift_time(t, 1.0), t)
    torch.testing.assert_close(shift_time(t, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3.0), t)
    grid = time_grid(4, power=1.0, shift=3.0)
    torch.testing.assert_close(shift_time(torch.linspace(1, 0, 5), 3.0), torch.tensor(grid))


def test_the_time_shift_moves_the_logits_of_drawn_times_by_its_logarithm_and_nothing_else():
    plain, shifted = DiTConfig(), DiTConfig()
    shifted.training.t_shift = 4.0
    a, b = (step_draws(cfg, 3, (50, 2, 4, 4), torch.device("cpu")) for cfg in (plain, shifted))
    torch.testing.assert_close(torch.logit(b.t), torch.logit(a.t) + math.log(4.0), rtol=1e-3, atol=1e-3)
    assert torch.equal(a.eps, b.eps) and torch.equal(a.drop, b.drop)
