"""Flow matching: the path's identities, the time grids, and solvers that converge with their order."""

from __future__ import annotations

import math

import pytest
import torch

from ssdd.model.flow import euler, interpolate, logit_normal_t, predict_data, time_grid, uniform_t, velocity_target


def test_the_velocity_leads_from_any_point_of_the_path_to_the_data():
    x, eps, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0.0, 0.3, 0.9, 1.0])
    x_t, v = interpolate(x, eps, t), velocity_target(x, eps)
    assert torch.allclose(predict_data(x_t, v, t), x, atol=1e-6)
    assert torch.equal(x_t[0], x[0]) and torch.equal(x_t[3], eps[3])


def test_grids_fall_from_noise_to_data():
    expected = torch.tensor([1, 0.765625, 0.5625, 0.390625, 0.25, 0.140625, 0.0625, 0.015625, 0])
    assert torch.equal(torch.tensor(time_grid(8, power=2.0)), expected)
    assert time_grid(1) == [1.0, 0.0]
    shifted = time_grid(4, power=1.0, shift=3.0)
    t = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    assert torch.allclose(torch.tensor(shifted), 3 * t / (1 + 2 * t))
    with pytest.raises(ValueError, match="at least 1"):
        time_grid(0)


def test_euler_converges_with_order_one():
    # dx/dt = -v = x: from x(1) = e the exact end is x(0) = 1.
    errors = []
    for steps in (16, 32):
        end = euler(lambda x, t: -x, torch.full((1,), math.e, dtype=torch.float32), time_grid(steps, power=1.0))
        errors.append(abs(end.item() - 1))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_straight_paths_are_solved_in_one_step_and_the_callback_sees_every_state():
    x, eps, states = torch.randn(2, 3), torch.randn(2, 3), []
    end = euler(lambda x_t, t: x - eps, eps, time_grid(4), lambda i, state: states.append((i, state)))
    assert torch.allclose(end, x, atol=1e-6) and [i for i, _ in states] == [0, 1, 2, 3]
    assert torch.allclose(euler(lambda x_t, t: x - eps, eps, time_grid(1)), x, atol=1e-6)


def test_the_state_stays_float32_when_the_network_does_not():
    end = euler(lambda x, t: (-x).half(), torch.ones(2, dtype=torch.float16), time_grid(3))
    assert end.dtype == torch.float32


def test_training_times_have_their_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.logit(logit_normal_t(20_000, generator, mean=0.4, std=1.6).double())
    assert logits.mean().item() == pytest.approx(0.4, abs=0.05) and logits.std().item() == pytest.approx(1.6, rel=0.02)
    t = uniform_t(20_000, generator)
    assert t.min() >= 0 and t.max() < 1 and t.mean().item() == pytest.approx(0.5, abs=0.01)
