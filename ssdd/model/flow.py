"""Flow matching on the straight path between data (t = 0) and noise (t = 1): path, time draws, time grids, Euler.

Path, solvers and networks know nothing of each other; the tokenizer's decoder and the generators share this file.
The generators' other solvers are in dit/samplers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t float32, a scalar or, from adaptive solvers, [B]) -> v of the same shape as x_t."""

Times = TypeVar("Times", np.ndarray, Tensor)

Callback = Callable[[int, Tensor], None]
"""(i, x) after step i of a solver."""


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 if its dtype is a narrower one."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def common_batch(images: int, latents: int, times: int) -> int:
    """The size of the batch where each of the three has one entry for all, or one for each of the batch.

    The batch is that of the images or latents; ValueError where the numbers do not match.
    """
    batch = max(images, latents)
    if not {images, latents, times} <= {1, batch}:
        raise ValueError(f"{images} images, {latents} latents and {times} times do not match")
    return batch


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """t, a scalar or [B], shaped to broadcast over x [B, ...]."""
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t eps; t is a scalar or [B] in [0, 1]."""
    t = expand_time(t, x)
    return (1 - t) * x + t * eps


def velocity_target(x: Tensor, eps: Tensor) -> Tensor:
    """v = x - eps = -dx_t/dt, so that a step of length dt towards the data adds v dt."""
    return x - eps


def predict_data(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x_0 = x_t + t v, the data end of the straight line through x_t."""
    return x_t + expand_time(t, x_t) * v


def predict_noise(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """eps = x_t - (1 - t) v, the noise end of the straight line through x_t.

    With v = E[x - eps | x_t] this is E[eps | x_t], and the score of p_t is -E[eps | x_t] / t, since
    p(x_t | x) = N((1 - t) x, t^2 I) has the score ((1 - t) x - x_t) / t^2 = -eps / t.
    """
    return x_t - (1 - (expand_time(t, x_t) if isinstance(t, Tensor) else t)) * v


def logit_normal_t(n: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """n training times sigmoid(N(mean, std^2)), float32 [n] on the generator's device (SD3, eq. 19)."""
    return torch.sigmoid(torch.randn(n, generator=generator, device=generator.device) * std + mean)


def uniform_t(n: int, generator: torch.Generator) -> Tensor:
    """n training times uniform on [0, 1), float32 [n] on the generator's device."""
    return torch.rand(n, generator=generator, device=generator.device)


def shift_time(t: Times, shift: float) -> Times:
    """s t / (1 + (s - 1) t) of times in [0, 1], as they are given; nearer the noise for s > 1 (SD3, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, power: float = 2.0, shift: float = 1.0) -> list[float]:
    """steps + 1 times falling from 1 (noise) to 0 (data), each a float32 number.

    `power` p gives linspace(1, 0)^p, finer near the data for p > 1 (SSDD). `shift` is that of `shift_time`, finer near
    the noise above 1 (SD3, LightningDiT; in our direction of time).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    t = np.linspace(1, 0, steps + 1) ** power
    return shift_time(t, shift).astype(np.float32).tolist()


def step_lengths(grid: Sequence[float]) -> list[float]:
    """t_i - t_{i+1} of a grid, as float32 numbers."""
    return (-np.diff(np.asarray(grid, np.float32))).tolist()


def euler(velocity: Velocity, x: Tensor, grid: Sequence[float], callback: Callback | None = None) -> Tensor:
    """First-order solver: x <- x + v(x, t_i) (t_i - t_{i+1}) along `grid`; one evaluation per step.

    The state is float32 whatever the network's dtype, but for float64 noise. `callback(i, x)` sees the state after
    step i. Times are numbers of the host: on a GPU each becomes a fill kernel, so that no step waits for the device.
    """
    x = at_least_float32(x)
    for i, dt in enumerate(step_lengths(grid)):
        x = torch.add(x, velocity(x, x.new_full((), grid[i])).to(x.dtype), alpha=dt)
        if callback is not None:
            callback(i, x)
    return x
