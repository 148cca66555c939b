"""What a network's time, input and output mean: the border between checkpoints of all kinds and our velocity field.

Ours is v = x - eps at x_t = (1 - t) x + t eps, with t = 1 the noise. A network stays as raw as in its file;
samplers feed it `inputs(x_t, t)` and convert its output into v by `velocity(out, x_t, t)`. Guidance is the same before
and after: v is an affine function of the output. `CONVENTIONS` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from ssdd.model.flow import expand_time


@dataclass(frozen=True)
class FlowConvention:
    """A network of the straight path itself; only the clock and the sign of its velocity differ."""

    time_scale: float = 1.0
    time_reversed: bool = False
    sign: int = 1

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Input and time of the network at x_t [B, ...] and t, a scalar or [B] in [0, 1]."""
        return x_t, (1 - t if self.time_reversed else t) * self.time_scale

    def velocity(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Our velocity at (x_t, t) from the network's first C channels `out`, of x_t's shape."""
        return out if self.sign == 1 else -out

    @property
    def meaning(self) -> str:
        """Time and output in words, for the metadata of exported files."""
        ends = "t=0 noise, t=1 data" if self.time_reversed else "t=0 data, t=1 noise"
        output = "data - noise" if self.sign == 1 else "noise - data"
        return f"time {self.time_scale:g} t with {ends}; predicts {output} in the first C channels"


@dataclass(frozen=True)
class DDPMConvention:
    """A noise predictor of the 1000-step linear schedule (Ho et al. 2020) as a velocity field.

    x_k = a x + s eps with a^2 = prod(1 - beta), a^2 + s^2 = 1 has the signal-to-noise ratio of x_t where
    s / a = t / (1 - t); there x_k = x_t / sqrt((1 - t)^2 + t^2), at a step k between the trained ones (interpolated
    linearly in log s/a). The data is (x_t - t eps) / (1 - t), so v = (x_t - eps) / (1 - t), and an Euler step of ours
    is a DDIM step. The schedule reaches t = 0.0099 and 0.9937 only: beyond, the state is scaled to what it is
    there, as samplers of these models also do when they start from pure noise. Uniform grids in k resemble our time
    grid with shift 3.4.
    """

    meaning = "steps 0..999 of the linear DDPM schedule; predicts noise in the first C channels"

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Input and time (0..999, not rounded) of the network at x_t [B, ...] and t, a scalar or [B] in [0, 1]."""
        log_ratios = linear_schedule().to(t.device)
        t_k = _within_schedule(t)
        ratio = torch.log(t_k) - torch.log1p(-t_k)
        above = torch.searchsorted(log_ratios, ratio).clamp(1, len(log_ratios) - 1)
        low, high = log_ratios[above - 1], log_ratios[above]
        step = above - 1 + ((ratio - low) / (high - low)).clamp(0, 1)
        return x_t / expand_time(_path_norm(t), x_t), step

    def velocity(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Our velocity at (x_t, t) from the predicted noise `out`, of x_t's shape."""
        t_k = _within_schedule(t)
        x_k = x_t * expand_time(_path_norm(t_k) / _path_norm(t), x_t)
        return (x_k - out) / (1 - expand_time(t_k, x_t))


Convention = FlowConvention | DDPMConvention

CONVENTIONS: dict[str, Callable[[float], Convention]] = {
    "flow": FlowConvention,  # this project's: time_scale t, x - eps
    "sit": partial(FlowConvention, time_reversed=True),  # SiT, LightningDiT: 1 - t; their dx/d(1 - t) is ours
    "repa": partial(FlowConvention, sign=-1),  # REPA, REPA-E: t, eps - x
    "ddpm": lambda time_scale: DDPMConvention(),  # DiT: a step of the same signal-to-noise ratio, eps
}
"""Name -> the convention of networks that see `time_scale` t."""


def convention(name: str, time_scale: float) -> Convention:
    """The convention of a name in `CONVENTIONS`; `time_scale` multiplies the times of a flow network."""
    return CONVENTIONS[name](time_scale)


@cache
def linear_schedule() -> Tensor:
    """log(s_k / a_k) of the 1000 steps with beta from 1e-4 to 0.02, float32 [1000], rising."""
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # a_k^2
    return torch.from_numpy((0.5 * np.log((1 - signal) / signal)).astype(np.float32))


def _within_schedule(t: Tensor) -> Tensor:
    """t limited to the times that have a step of the schedule."""
    first, last = linear_schedule()[[0, -1]].sigmoid().tolist()  # t = sigmoid(log(t / (1 - t)))
    return t.clamp(first, last)


def _path_norm(t: Tensor) -> Tensor:
    """sqrt((1 - t)^2 + t^2), the deviation of x_t for data of unit variance."""
    return torch.sqrt((1 - t) ** 2 + t**2)
