"""Exponential moving average of parameters, kept in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.sharding import laid_out_as, local

AVERAGE = "model_ema"
"""The file of a run's first average, and how the names of further ones begin."""


@dataclass
class EmaConfig:
    """Exponential moving averages of the weights."""

    decays: list[float] = field(default_factory=lambda: [0.9999])
    """Decays per step, each ramping up as (1 + k) / (10 + k) over the first updates. The first average is model_ema,
    which checkpoint references select; the file of a further one is named by its decay, as model_ema_0.999."""
    start_iter: int = 0
    """Step at which averaging starts, at most a tenth of the planned steps; before it the average is a copy."""


class Ema:
    """Averages of named parameters: a copy until ``start_iter`` updates were made, then a moving average.

    With n the updates made before and k = n - start_iter, update n copies while k < 0; from then on it is
    ``average <- d average + (1 - d) parameter`` with ``d = min(decay, (1 + k) / (10 + k))``.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float = 0.999, start_iter: int = 0):
        if not 0 <= decay < 1:
            raise UserError(f"training.ema.decays must be in [0, 1); got {decay}")
        self.decay = decay
        self.start_iter = start_iter
        self.updates = 0
        self._averages = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, named_params: Mapping[str, Tensor]) -> None:
        """Take in the parameters after an optimizer step; the names are those given to the constructor."""
        if named_params.keys() != self._averages.keys():
            raise ValueError(f"other parameters than averaged: {sorted(named_params.keys() ^ self._averages.keys())}")
        averages = [local(average) for average in self._averages.values()]
        current = [local(named_params[name].detach()).to(torch.float32) for name in self._averages]
        k = self.updates - self.start_iter
        if k < 0:
            torch._foreach_copy_(averages, current)
        else:
            torch._foreach_lerp_(averages, current, 1 - min(self.decay, (1 + k) / (10 + k)))
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """Name -> float32 average. These are the live tensors: copy them to keep their present values."""
        return dict(self._averages)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides :meth:`tensors`."""
        return {"updates": self.updates, "start_iter": self.start_iter}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from saved averages and count. :class:`UserError` when names or shapes differ."""
        if tensors.keys() != self._averages.keys():
            differing = sorted(tensors.keys() ^ self._averages.keys())
            raise UserError(f"the saved EMA has other parameters than the model: {', '.join(differing[:5])}")
        for name, average in self._averages.items():
            if average.shape != tensors[name].shape:
                shapes = f"{tuple(tensors[name].shape)}, in the model {tuple(average.shape)}"
                raise UserError(f"the saved EMA of {name} has shape {shapes}; use the config of that checkpoint")
        for name, average in self._averages.items():
            average.copy_(laid_out_as(average, tensors[name]))
        self.updates = int(state["updates"])
        self.start_iter = int(state.get("start_iter", self.start_iter))  # of a prolonged run, that of its beginning


def build_averages(cfg: EmaConfig, parameters: Mapping[str, Tensor], steps: int) -> dict[str, Ema]:
    """File name -> average: `model_ema` of the first decay, `model_ema_0.9999` of a further one.

    steps: planned, of which at most a tenth pass before averaging starts. UserError unless there is one decay, or
    several that their names tell apart.
    """
    if not cfg.decays or len({f"{decay:g}" for decay in cfg.decays}) < len(cfg.decays):
        raise UserError(f"training.ema.decays={cfg.decays}: expected one decay or several different ones")
    start = min(cfg.start_iter, steps // 10)
    names = [AVERAGE, *(f"{AVERAGE}_{decay:g}" for decay in cfg.decays[1:])]
    return {name: Ema(parameters, decay, start) for name, decay in zip(names, cfg.decays, strict=True)}


def update_averages(averages: Mapping[str, Ema], named_params: Mapping[str, Tensor]) -> None:
    """Take in the parameters after an optimizer step, all of them."""
    for average in averages.values():
        average.update(named_params)
