"""Classifier-free guidance (Ho & Salimans): a DiT and a batch of labels as one velocity field for ssdd.flow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit.model import DiT
from ssdd.engine.errors import UserError

FULL_INTERVAL = (0.0, 1.0)


def guided_velocity(
    model: DiT,
    y: Tensor,
    cfg_scale: float = 1.0,
    *,
    cfg_channels: int | None = None,
    interval: tuple[float, float] = FULL_INTERVAL,
) -> Callable[[Tensor, Tensor], Tensor]:
    """velocity(x_t [B, C, H, W], t scalar in [0, 1], 1 = noise) -> v [B, C, H, W] in float32, towards the data.

    v = u + cfg_scale (c - u), with c the prediction for the classes y [B] and u that for the null class. Scale 1 means
    no guidance. `cfg_channels` guides the first channels only (3 reproduces DiT's tables); None guides all. Outside
    `interval` (inclusive; Kynkäänniemi et al. 2024) there is no guidance. Without guidance the unconditional half of
    the batch is not computed.
    UserError when guidance is asked of a model without a null class, or the interval is empty.
    """
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise UserError(f"sampling.cfg_interval={list(interval)} must be two times 0 <= low <= high <= 1 (1 is noise).")
    if cfg_scale != 1.0 and not model.null_class:
        raise UserError(
            f"sampling.cfg_scale={cfg_scale} needs a model with a null class, and this one was trained without "
            "(model.class_dropout=0); sample with sampling.cfg_scale=1."
        )
    null = torch.full_like(y, model.num_classes)
    doubled = torch.cat([y, null])

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        # Reading t costs a device sync, so only an interval that excludes something reads it.
        guide = cfg_scale != 1.0 and (tuple(interval) == FULL_INTERVAL or low <= float(t) <= high)
        rows = 2 * len(y) if guide else len(y)
        t = t.to(x_t)
        x_in, time = model.convention.inputs(x_t, t)
        times = time.expand(rows)
        if guide:
            out = model.forward_with_cfg(x_in.repeat(2, 1, 1, 1), times, doubled, cfg_scale, cfg_channels)[: len(y)]
        else:
            out = model(x_in, times, y)
        return model.convention.velocity(out[:, : model.in_channels].float(), x_t, t)

    return velocity
