"""Solvers converge with their order on exact velocity fields; the SDE has the ODE's marginals; none reads a device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from scipy.integrate import RK45, solve_ivp
from torch import Tensor

from dit import samplers
from dit.samplers import DIFFUSIONS, adaptive, heun, sde, sde_grid
from ssdd.engine.errors import UserError
from ssdd.engine.random import batch_generator, indexed_noise
from ssdd.model.flow import euler, interpolate, predict_noise, time_grid, velocity_target
from tests.dit.closed_forms import GAUSSIAN, MIXTURE

NOISE = indexed_noise(range(64), (2,), seed=0)


def exact(field: Callable, x: Tensor) -> Tensor:
    """The end of the ODE from t = 1 by scipy's DOP853 in float64."""

    def slope(t: float, flat: object) -> object:
        return -field(torch.from_numpy(flat).view_as(x), torch.tensor(t)).flatten().numpy()

    end = solve_ivp(slope, (1.0, 0.0), x.double().flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(end.y[:, -1]).view_as(x)


def counted(field: Callable) -> tuple[Callable, list[Tensor]]:
    times: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return field(x, t)

    return velocity, times


def slope(steps: list[int], errors: list[float]) -> float:
    """Order of convergence: minus the slope of log(error) against log(steps)."""
    logs = torch.tensor([steps, errors], dtype=torch.float64).log()
    logs = logs - logs.mean(dim=1, keepdim=True)
    return -((logs[0] * logs[1]).sum() / logs[0].square().sum()).item()


@pytest.mark.parametrize("field", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [(euler, 1, [64, 128, 256, 512]), (heun, 2, [32, 64, 128, 256])],
    ids=["euler", "heun"],
)
def test_solvers_converge_with_their_order(field, solver, order, steps):
    end = exact(field.velocity, NOISE)
    errors = [
        (solver(field.velocity, NOISE, time_grid(n, power=1.0)) - end).square().mean().sqrt().item() for n in steps
    ]
    print(f"\n{order=} slope={slope(steps, errors):.3f} {steps} {errors}")
    assert slope(steps, errors) == pytest.approx(order, abs=0.1)
    assert errors == sorted(errors, reverse=True)


def test_the_gaussians_ode_ends_where_its_closed_form_says():
    torch.testing.assert_close(exact(GAUSSIAN.velocity, NOISE), GAUSSIAN.transport(NOISE, 1.0, 0.0), atol=1e-8, rtol=0)


def test_the_adaptive_solver_is_the_dormand_prince_pair():
    stages = torch.zeros(6, 5, dtype=torch.float64)
    for row, weights in zip(stages[1:], samplers._STAGES, strict=False):
        row[: len(weights)] = torch.tensor(weights, dtype=torch.float64)
    assert torch.equal(stages, torch.from_numpy(RK45.A)) and samplers._NODES[:-1] == tuple(RK45.C)
    assert samplers._STAGES[-1] == tuple(RK45.B) and tuple(-RK45.E) == samplers._ERROR


@pytest.mark.parametrize("field", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_the_adaptive_error_falls_with_the_tolerance_faster_than_evaluations_to_the_fourth(field):
    # 16 samples of 32 points each: what is controlled is the mean square of a sample's error.
    points = indexed_noise(range(16), (64,), seed=0)
    end, errors, evaluations = exact(field.velocity, points.view(-1, 2)).view_as(points), [], []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        velocity, times = counted(
            lambda x, t: field.velocity(x.view(-1, 2), t.repeat_interleave(32)).view_as(x)  # t is [16]
        )
        x = adaptive(velocity, points, [1.0, 0.0], rtol=tolerance, atol=tolerance)
        errors.append((x - end).square().mean().sqrt().item())
        evaluations.append(len(times))
        assert errors[-1] < 10 * tolerance
    print(f"\nslope={slope(evaluations, errors):.3f} {evaluations} {errors}")
    assert slope(evaluations, errors) > 4 and evaluations[-1] < 100


def test_adaptive_steps_are_each_samples_own():
    together = adaptive(MIXTURE.velocity, NOISE, [1.0, 0.5, 0.0])
    alone = torch.cat([adaptive(MIXTURE.velocity, row[None], [1.0, 0.5, 0.0]) for row in NOISE])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    velocity, times = counted(MIXTURE.velocity)
    adaptive(velocity, NOISE, [1.0, 0.0])
    assert any(t.min() < t.max() for t in times) and all(t.min() >= 0 and t.max() <= 1 for t in times)


def test_the_adaptive_solver_gives_up_with_advice_and_passes_what_is_not_finite_on():
    with pytest.raises(UserError, match=r"sampling\.rtol"):
        adaptive(GAUSSIAN.velocity, NOISE, [1.0, 0.0], rtol=1e-7, atol=1e-7, max_steps=20)
    broken = adaptive(lambda x, t: x * math.nan, NOISE, [1.0, 0.0])
    assert broken.isnan().all()


@pytest.mark.parametrize(("solver", "evaluations"), [(euler, 7), (heun, 13), (sde, 7)])
def test_evaluations_are_as_many_as_the_configuration_says(solver, evaluations):
    velocity, times = counted(GAUSSIAN.velocity)
    options = {"noise": normals((64, 2))} if solver is sde else {}
    states = []
    solver(velocity, NOISE, time_grid(7, power=1.0), lambda i, x: states.append(i), **options)
    assert len(times) == evaluations and states == list(range(7)) and min(times) > 0


@pytest.mark.parametrize("solver", [euler, heun, adaptive, sde])
def test_a_grid_solved_in_pieces_gives_the_same_bits(solver):
    grid = time_grid(7, power=1.0)

    def solve(*pieces: list[float]) -> Tensor:
        options, x = {"noise": normals((64, 2))} if solver is sde else {}, NOISE
        for piece in pieces:
            x = solver(MIXTURE.velocity, x, piece, **options)
        return x

    assert torch.equal(solve(grid), solve(grid[:3], grid[2:4], grid[3:]))


def normals(shape: tuple[int, ...], seed: int = 0) -> Iterator[Tensor]:
    return (torch.randn(shape, generator=batch_generator("cpu", seed, i)) for i in itertools.count())


def test_the_noise_end_of_the_path_is_minus_t_times_the_score():
    x, eps, t = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0.1, 0.3, 0.9, 1.0])
    x_t = interpolate(x, eps, t)
    assert torch.allclose(predict_noise(x_t, velocity_target(x, eps), t), eps, atol=1e-6)
    # The Gaussian's score is -(x_t - (1 - t) mean) / var_t.
    time = torch.tensor(0.3, dtype=torch.float64)
    score = -(NOISE.double() - 0.7 * GAUSSIAN.mean) / GAUSSIAN.variance(0.3)
    velocity = GAUSSIAN.velocity(NOISE, time)
    torch.testing.assert_close(-predict_noise(NOISE.double(), velocity, 0.3) / 0.3, score, atol=1e-6, rtol=0)


def chain_moments(grid: list[float], diffusion: str, scale: float) -> tuple[Tensor, Tensor]:
    """Mean and variance at the end of the discrete chain on GAUSSIAN: every step is affine, x <- a x + b + c noise."""
    mean, variance = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for t, t_next in itertools.pairwise(grid):
        dt, w = t - t_next, scale * DIFFUSIONS[diffusion](t) if t_next > 0 else 0.0
        gain = ((1 - t) * GAUSSIAN.std**2 - t) / GAUSSIAN.variance(t) - w / 2 / GAUSSIAN.variance(t)
        mean = mean + dt * (GAUSSIAN.mean + gain * (mean - (1 - t) * GAUSSIAN.mean))
        variance = (1 + dt * gain) ** 2 * variance + w * dt
    return mean, variance


@pytest.mark.parametrize(("diffusion", "scale"), [("sigma", 1.0), ("sigma", 0.5), ("sine", 1.0)])
def test_the_sde_has_the_moments_of_its_chain_and_the_chain_tends_to_the_datas(diffusion, scale):
    # Statistical: means deviate by 4 std / sqrt(n), variances by 4 var sqrt(2 / n) with a chance of 6e-5 each.
    n, grid = 40_000, sde_grid(40)
    start = torch.randn(n, 2, generator=batch_generator("cpu", 0, "start"))
    x = sde(GAUSSIAN.velocity, start, grid, noise=normals((n, 2)), diffusion=diffusion, scale=scale).double()
    mean, variance = chain_moments(grid, diffusion, scale)
    assert ((x.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    assert ((x.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / n)).all()
    assert abs(torch.corrcoef(x.T)[0, 1].item()) < 4 / math.sqrt(n)
    # Exact: the chain's own error halves as its steps double and the last step shrinks with them.
    errors, steps = [], [100, 200, 400, 800]
    for count in steps:
        mean, variance = chain_moments(sde_grid(count, last_step=4 / count), diffusion, scale)
        errors.append(max((mean - GAUSSIAN.mean).abs().max(), (variance.sqrt() - GAUSSIAN.std).abs().max()).item())
    print(f"\n{diffusion=} {scale=} slope={slope(steps, errors):.3f} {errors}")
    assert slope(steps, errors) > 0.8


@pytest.mark.parametrize("field", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_many_sde_steps_give_the_datas_mean_and_covariance(field):
    # Margins of 4 deviations of the sample mean, and of 5 of a variance (a mixture's is below a Gaussian's), and 0.01
    # for the steps. The solver that forgot the score or the noise would be wrong by tenths.
    n = 8_000
    start = torch.randn(n, 2, generator=batch_generator("cpu", 1, "start"))
    x = sde(field.velocity, start, sde_grid(500, last_step=0.01), noise=normals((n, 2), seed=1)).double()
    mean, covariance = field.moments()
    scale = covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 4 * scale / math.sqrt(n) + 0.01 * scale).all()
    error = (torch.cov(x.T) - covariance) / (scale[:, None] * scale)
    assert (error.abs() < 5 * math.sqrt(2 / n) + 0.01).all()


def test_an_sde_without_diffusion_is_euler_and_its_last_step_is_deterministic():
    grid = sde_grid(9)
    assert len(grid) == 10 and grid[0] == 1.0 and grid[-2:] == [pytest.approx(0.04), 0.0] and sde_grid(1) == [1.0, 0.0]
    assert sde_grid(9, shift=3.0)[4] > grid[4]
    assert torch.equal(
        sde(MIXTURE.velocity, NOISE, grid, noise=normals((64, 2)), scale=0.0), euler(MIXTURE.velocity, NOISE, grid)
    )
    noise = normals((64, 2))
    sde(MIXTURE.velocity, NOISE, grid, noise=noise)
    assert torch.equal(next(noise), next(itertools.islice(normals((64, 2)), 8, None)))  # eight of nine steps drew


def test_solvers_with_a_grid_never_read_the_device():
    # Tensors on the meta device have no values, so that any reading of one raises.
    x, grid = torch.empty(3, 2, device="meta"), time_grid(4, power=1.0)
    for solver in (euler, heun, partial(sde, noise=itertools.repeat(x))):
        assert solver(lambda x, t: -x * t, x, grid).is_meta
    with pytest.raises((NotImplementedError, RuntimeError)):
        adaptive(lambda x, t: -x, x, [1.0, 0.0])
