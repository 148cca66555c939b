"""Solvers of the generators, all functions (velocity, x, grid, callback, ...) -> x, as in k-diffusion.

`velocity` is a field of ssdd.model.flow (t = 0 data, t = 1 noise, v towards the data), `grid` falling times as numbers
of the host, x [B, ...] the state at grid[0]; the result is the state at grid[-1] in float32. `callback(i, x)` sees the
state after step i of the grid. No solver but `adaptive` waits for the device. A grid may be cut at any of its points
and solved piece by piece with the same result, which is how guidance is switched on and off (dit/guidance.py).
`SAMPLERS` lists them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dit.guidance import interval_grid
from ssdd.engine.errors import UserError
from ssdd.model.flow import Callback, Velocity, euler, expand_time, predict_noise, step_lengths, time_grid

DIFFUSIONS = {
    "sigma": lambda t: 2 * t,
    "sine": lambda t: 2 * math.sin(math.pi * t) ** 2,
}
"""Diffusion coefficients w(t) of `sde`; `sigma` is SiT's default form, the noise level t, counted as w / 2."""


def heun(velocity: Velocity, x: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Second-order solver (explicit trapezoid); two evaluations per step, but one on a step into t = 0.

    That last step is Euler's, as in EDM (Karras et al. 2022, algorithm 1): networks are hardly trained at t = 0, and
    one step of order one leaves the whole of order two.
    """
    x = x.float()
    for i, dt in enumerate(step_lengths(grid)):
        v = velocity(x, x.new_full((), grid[i])).float()
        x_next = torch.add(x, v, alpha=dt)
        if grid[i + 1] > 0:
            v_next = velocity(x_next, x.new_full((), grid[i + 1])).float()
            x_next = torch.add(x, v + v_next, alpha=dt / 2)
        x = x_next
        if callback is not None:
            callback(i, x)
    return x


def sde(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    noise: Iterator[Tensor],
    diffusion: str = "sigma",
    scale: float = 1.0,
) -> Tensor:
    """Euler-Maruyama on a reverse SDE with the marginals of the ODE (as in SiT); one evaluation per step.

    In reversed time r = 1 - t the ODE is dx = v dr. Adding Langevin dynamics of p_t at any rate w(t) >= 0 changes no
    marginal, because its drift (w / 2) s with the score s = grad log p_t cancels its diffusion in the Fokker-Planck
    equation:

        dx = (v + (w / 2) s) dr + sqrt(w) dW,    s = -E[eps | x_t] / t,    E[eps | x_t] = x_t - (1 - t) v.

    w is `scale` times `DIFFUSIONS[diffusion]`; 0 is Euler's solver. Each step takes the next standard normal tensor of
    `noise`, except a step into t = 0: that one is deterministic and ends at E[x | x_t] = x_t + t v.
    """
    x = x.float()
    for i, dt in enumerate(step_lengths(grid)):
        t = grid[i]
        v = velocity(x, x.new_full((), t)).float()
        if grid[i + 1] > 0:
            w = scale * DIFFUSIONS[diffusion](t)
            drift = torch.add(v, predict_noise(x, v, t), alpha=-w / (2 * t))
            x = torch.add(x, drift, alpha=dt).add_(next(noise), alpha=math.sqrt(w * dt))
        else:
            x = torch.add(x, v, alpha=dt)
        if callback is not None:
            callback(i, x)
    return x


def sde_grid(steps: int, shift: float = 1.0, last_step: float = 0.04) -> list[float]:
    """steps + 1 times from 1 to `last_step` and then 0, for `sde`; float32 numbers.

    The noise of an Euler-Maruyama step near t = 0 is as large as t itself, so the last step is deterministic
    and, as in SiT, begins at 0.04.
    """
    if steps == 1:
        return [1.0, 0.0]
    times = torch.tensor(time_grid(steps - 1, power=1.0, shift=shift), dtype=torch.float64)
    return [*(last_step + (1 - last_step) * times).float().tolist(), 0.0]


# Dormand & Prince 1980, RK5(4)7FM: nodes, stages, and what the embedded fourth-order solution differs by.
_NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # the fifth-order solution itself
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def adaptive(
    velocity: Velocity,
    x: Tensor,
    grid: Sequence[float],
    callback: Callback | None = None,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-5,
    max_steps: int = 1000,
) -> Tensor:
    """Dormand-Prince 5(4) from grid point to grid point, each sample with its own steps.

    A step's error estimate, as root mean square over a sample of error / (atol + rtol |x|), is kept below 1. Libraries
    take that mean over the whole batch (torchdiffeq), so that a sample would depend on which others are drawn with it;
    here `velocity` sees a time [B]. Every trial step costs six evaluations of the whole batch and one wait for the
    device; the batch is done when its slowest sample is.
    UserError when `max_steps` trial steps between two grid points do not suffice.
    """
    x = x.float()
    for i, (start, end) in enumerate(pairwise(grid)):
        x = _dormand_prince(velocity, x, start, end, rtol, atol, max_steps)
        if callback is not None:
            callback(i, x)
    return x


def _dormand_prince(
    velocity: Velocity, x: Tensor, start: float, end: float, rtol: float, atol: float, max_steps: int
) -> Tensor:
    t = x.new_full((len(x),), start)  # [B], as are dt, error, accepted
    dt = torch.full_like(t, (start - end) / 10)
    first = velocity(x, t).float()
    for _ in range(max_steps):
        left = t - end
        if not bool((left > 0).any()):
            return x
        dt = dt.minimum(left)  # 0 for samples that have arrived: they stay as they are
        step, slopes, x_next = expand_time(dt, x), [first], x
        for node, weights in zip(_NODES[1:], _STAGES, strict=True):
            x_next = x + step * _combine(weights, slopes)
            slopes.append(velocity(x_next, (t - node * dt).clamp(min=end)).float())
        tolerance = atol + rtol * x.abs().maximum(x_next.abs())
        error = (step * _combine(_ERROR, slopes) / tolerance).flatten(1).square().mean(dim=1).sqrt()
        accepted = ~(error > 1)  # a sample that is not finite runs on to its end, where the caller sees it
        taken = expand_time(accepted, x)
        x, first = torch.where(taken, x_next, x), torch.where(taken, slopes[-1], first)
        t = torch.where(accepted, torch.where(dt < left, t - dt, end), t)
        growth = (0.9 * error**-0.2).nan_to_num(nan=1.0).clamp(min=0.2)
        dt = dt * growth.minimum(torch.where(accepted, 10.0, 1.0))
    raise UserError(
        f"the adaptive solver did not get from t={start} to t={end} in {max_steps} steps with rtol={rtol:g} and "
        f"atol={atol:g}: give larger sampling.rtol and sampling.atol (float32 ends near 1e-6), or sampling.sampler=heun"
    )


def _combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Sum of weights times slopes, leaving out zeros."""
    return sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)


@dataclass(frozen=True)
class Sampler:
    """A solver with its grid, both set by the keys of `sampling`, the argument `cfg` here.

    evaluations: of the velocity in a grid of so many steps; None where the solver takes as many as it needs.
    grid: falling times from 1 to 0. options: keyword of `solve` -> key of `sampling`. noise: `solve` has the keyword
    `noise`, standard normal tensors of x's shape, as many as it asks for.
    """

    solve: Callable[..., Tensor]
    evaluations: Callable[[int], int] | None
    grid: Callable[[Any], list[float]] = lambda cfg: time_grid(cfg.steps, power=1.0, shift=cfg.shift)
    options: Mapping[str, str] = field(default_factory=dict)
    noise: bool = False

    def solver(self, cfg: Any, noise: Iterator[Tensor]) -> Callable[[Velocity, Tensor, Sequence[float]], Tensor]:
        """`solve` with its options: (velocity, x, grid) -> x."""
        options = {keyword: getattr(cfg, key) for keyword, key in self.options.items()}
        return partial(self.solve, **options, **({"noise": noise} if self.noise else {}))


SAMPLERS = {
    "euler": Sampler(euler, lambda steps: steps),
    "heun": Sampler(heun, lambda steps: 2 * steps - 1),
    "adaptive": Sampler(
        adaptive, None, lambda cfg: interval_grid(tuple(cfg.cfg_interval)), {"rtol": "rtol", "atol": "atol"}
    ),
    "sde": Sampler(
        sde,
        lambda steps: steps,
        lambda cfg: sde_grid(cfg.steps, cfg.shift, cfg.sde_last_step),
        {"diffusion": "sde_diffusion", "scale": "sde_scale"},
        noise=True,
    ),
}
"""The values of `sampling.sampler`."""
