"""Foreign networks become our velocity field exactly: closed forms on Gaussian data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dit.guidance import guided_velocity
from dit.model import DiT
from dit.time_convention import CONVENTIONS, convention
from ssdd.model.flow import euler, time_grid
from tests.golden import fill_state_dict, load_case

MEAN, STD = 0.7, 0.5  # the data: every number of x is N(MEAN, STD^2)


def posterior_noise(x: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """E[eps | a x_0 + s eps = x] of the data."""
    return s * (x - a * MEAN) / (a**2 * STD**2 + s**2)


def exact_velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    eps = posterior_noise(x_t, 1 - t, t)
    data = MEAN + (1 - t) * STD**2 * (x_t - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
    return data - eps


def signal_levels() -> np.ndarray:
    """a_k of DDPM's schedule, by its definition."""
    return np.sqrt(np.cumprod([1 - (1e-4 + (0.02 - 1e-4) * k / 999) for k in range(1000)]))


def noise_predictor(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The exact noise predictor, as a perfectly trained DiT would be: a_k and s_k between the steps by log(s / a)."""
    levels = signal_levels()
    log_ratio = np.interp(step.double().numpy(), np.arange(1000), np.log(np.sqrt(1 - levels**2) / levels))
    a = torch.as_tensor(1 / np.sqrt(1 + np.exp(2 * log_ratio)), dtype=torch.float32)
    return posterior_noise(x, a, torch.sqrt(1 - a**2))


def ddpm_velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    border = convention("ddpm", 1.0)
    return border.velocity(noise_predictor(*border.inputs(x_t, t)), x_t, t)


@pytest.mark.parametrize("k", [0, 1, 17, 500, 998, 999])
def test_a_noise_predictor_sees_the_state_that_it_was_trained_on(k):
    a = signal_levels()[k]
    s = math.sqrt(1 - a**2)
    x, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = torch.tensor(s / (a + s), dtype=torch.float32)  # t / (1 - t) = s / a
    state, step = convention("ddpm", 1.0).inputs((1 - t) * x + t * eps, t)
    torch.testing.assert_close(state, float(a) * x + s * eps, atol=1e-5, rtol=1e-5)
    assert step.item() == pytest.approx(k, abs=2e-2)


@pytest.mark.parametrize("t", [0.01, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99])
def test_an_exact_noise_predictor_gives_the_exact_velocity(t):
    x_t, t = torch.linspace(-3, 3, 101), torch.tensor(t)
    torch.testing.assert_close(ddpm_velocity(x_t, t), exact_velocity(x_t, t), atol=2e-4, rtol=2e-4)


def test_beyond_the_schedule_the_velocity_stays_finite_and_close():
    deviations = torch.linspace(-2, 2, 101)
    for t in (torch.tensor(1.0), torch.tensor(0.997), torch.tensor(0.004), torch.tensor(0.0)):
        x_t = (1 - t) * MEAN + deviations * torch.sqrt(((1 - t) * STD) ** 2 + t**2)
        torch.testing.assert_close(ddpm_velocity(x_t, t), exact_velocity(x_t, t), atol=0.05, rtol=0)


def test_times_may_differ_between_rows():
    x_t, t = torch.randn(3, 2, 4, 4), torch.tensor([0.2, 0.6, 1.0])
    border = convention("ddpm", 1.0)
    state, step = border.inputs(x_t, t)
    out = torch.randn_like(x_t)
    for i in range(3):
        alone = border.inputs(x_t[i : i + 1], t[i])
        assert torch.equal(alone[0][0], state[i]) and torch.equal(alone[1], step[i])
        assert torch.equal(border.velocity(out, x_t, t)[i], border.velocity(out[i : i + 1], x_t[i : i + 1], t[i])[0])


def test_our_solver_draws_the_data_from_a_noise_predictor():
    eps = torch.linspace(-2, 2, 41)
    drawn = euler(ddpm_velocity, eps, time_grid(200, power=1.0, shift=3.4))
    torch.testing.assert_close(drawn, MEAN + STD * eps, atol=0.02, rtol=0)  # the flow of a Gaussian is this line


def model_with(name: str, time_scale: float = 1.0) -> DiT:
    model = DiT.from_name("DiT-XXS/1", (2, 4), 3, 5, learn_sigma=True, time_scale=time_scale, convention=name)
    model.load_state_dict(fill_state_dict(model.state_dict(), keep=("pos_embed",)))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_guided_velocity_is_the_guided_answer_under_every_convention(name):
    """SiT: their velocity at their time 1 - t is ours. REPA: minus theirs. DiT: (x_t - eps) / (1 - t)."""
    model, x_t, y, t = model_with(name), torch.randn(2, 3, 2, 4), torch.tensor([0, 4]), 0.3
    scaled, seen = x_t, {"flow": 0.3, "sit": 0.7, "repa": 0.3}.get(name)
    if name == "ddpm":
        border = convention("ddpm", 1.0)
        scaled, seen = (value.clone() for value in border.inputs(x_t, torch.tensor(t)))
        torch.testing.assert_close(scaled, x_t / math.sqrt(0.58))
    times = torch.full((2,), float(seen))
    conditional = model(scaled, times, y)[:, :3]
    unconditional = model(scaled, times, torch.full_like(y, 5))[:, :3]
    out = unconditional + 3.0 * (conditional - unconditional)
    expected = {"flow": out, "sit": out, "repa": -out, "ddpm": (x_t - out) / 0.7}[name]
    torch.testing.assert_close(guided_velocity(model, y, 3.0)(x_t, torch.tensor(t)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sit_s_reference_outputs_are_our_velocity_at_the_reversed_time():
    case = load_case("dit_S2_8")
    with torch.device("meta"):
        model = DiT.from_name("DiT-S/2", 8, 4, 10, convention="sit", time_scale=1.0).eval()
    model.load_state_dict(fill_state_dict(model.state_dict(), keep=("pos_embed",)), assign=True)
    for i, theirs in enumerate(case["in.t_sit"]):
        velocity = guided_velocity(model, case["in.y"][i : i + 1])
        v = velocity(case["in.x"][i : i + 1], 1 - theirs)
        torch.testing.assert_close(v, case["out.sit"][i : i + 1], atol=2e-4, rtol=0)
