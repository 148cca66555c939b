"""Guidance: a generator, a batch of labels and perhaps a weaker generator as one velocity field for the solvers.

Classifier-free guidance (Ho & Salimans 2022) leads away from the prediction u without a class, autoguidance (Karras et
al. 2024, arXiv 2406.02507) from the prediction w of a weaker model for the same class. Both extrapolate the
conditional prediction c, each with its own scale, and their differences add:

    v = c + (cfg_scale - 1) (c - u) + (guide_scale - 1) (c - w)

so that with one scale at 1 the other method is left in its usual form, v = u + s (c - u) or v = w + s (c - w).
Time enters as a tensor that is never read: where guidance is on is decided from the grid (`split_by_interval`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dit.time_convention import Convention
from ssdd.engine.errors import UserError
from ssdd.model.flow import Velocity

FULL_INTERVAL = (0.0, 1.0)


class Generator(Protocol):
    """What guidance needs of a network; dit.model.DiT has it."""

    in_channels: int
    """C, channels of the latent."""
    num_classes: int
    """Number of classes, and the label of the null class."""
    null_class: bool
    """Whether the network knows the null class."""
    convention: Convention
    """What its time and output mean."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x [B, C, H, W], its own times [B], labels [B] -> [B, C or more, H, W]: the prediction comes first."""
        ...


def guided_velocity(
    model: Generator,
    y: Tensor,
    cfg_scale: float = 1.0,
    *,
    cfg_channels: int | None = None,
    guide: Generator | None = None,
    guide_scale: float = 1.0,
) -> Velocity:
    """velocity(x_t [B, C, H, W], t scalar or [B] in [0, 1], 1 = noise) -> v [B, C, H, W] in float32, towards the data.

    v is the module's formula for the classes y [B]. `cfg_channels` lets classifier-free guidance change the first
    channels only (3 reproduces DiT's tables); None is all. A scale of 1 switches its method off and costs nothing:
    `model` sees 2 B rows with classifier-free guidance and B without, `guide` B rows with autoguidance, else none.
    UserError when guidance is asked of a model without a null class, or of a guide for other channels or classes.
    """
    classifier_free, autoguided = cfg_scale != 1.0, guide is not None and guide_scale != 1.0
    if classifier_free and not model.null_class:
        raise UserError(
            f"sampling.cfg_scale={cfg_scale} needs a model with a null class, and this one was trained without "
            "(model.class_dropout=0); sample with sampling.cfg_scale=1"
        )
    if guide_scale != 1.0 and guide is None:
        raise UserError(
            f"sampling.guide_scale={guide_scale} needs sampling.guide, a checkpoint reference to a weaker model"
        )
    if guide is not None and (guide.in_channels, guide.num_classes) != (model.in_channels, model.num_classes):
        raise UserError(
            f"sampling.guide has {guide.in_channels} latent channels and {guide.num_classes} classes, "
            f"the guided model {model.in_channels} and {model.num_classes}; a guide must be a weaker model of the same "
            "latents"
        )
    channels = model.in_channels if cfg_channels is None else cfg_channels
    labels = torch.cat([y, torch.full_like(y, model.num_classes)]) if classifier_free else y

    def predict(network: Generator, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if len(y) > len(x_t):
            x_t, t = x_t.repeat(2, 1, 1, 1), t.expand(len(x_t)).repeat(2)
        x_in, time = network.convention.inputs(x_t, t)
        out = network(x_in, time.expand(len(x_t)), y)[:, : network.in_channels].float()
        return network.convention.velocity(out, x_t, t)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, *unconditional = predict(model, x_t, t, labels).split(len(x_t))
        v = conditional
        if classifier_free:
            guided = torch.lerp(unconditional[0][:, :channels], conditional[:, :channels], cfg_scale)
            v = torch.cat([guided, conditional[:, channels:]], dim=1)
        if autoguided:
            v = torch.add(v, conditional - predict(guide, x_t, t, y), alpha=guide_scale - 1)
        return v

    return velocity


def split_by_interval(
    grid: Sequence[float], interval: tuple[float, float] = FULL_INTERVAL
) -> list[tuple[bool, list[float]]]:
    """The grid cut into pieces of steps inside `interval` (True) and outside, neighbouring pieces sharing a point.

    A step t_i -> t_{i+1} is inside when low < t_i <= high (as in Kynkäänniemi et al. 2024), for all evaluations
    of its solver; times compare as the float32 numbers that grids hold.
    UserError when the interval is invalid.
    """
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise UserError(f"sampling.cfg_interval={list(interval)} must be two times 0 <= low <= high <= 1 (1 is noise)")
    steps = groupby(pairwise(grid), key=lambda step: bool(np.float32(low) < np.float32(step[0]) <= np.float32(high)))
    pieces = ((inside, list(piece)) for inside, piece in steps)
    return [(inside, [piece[0][0], *(end for _, end in piece)]) for inside, piece in pieces]


def interval_grid(interval: tuple[float, float] = FULL_INTERVAL) -> list[float]:
    """The coarsest grid with the interval's ends among its points, for solvers that choose their own steps."""
    return sorted({0.0, 1.0, *(float(np.float32(t)) for t in interval)}, reverse=True)
