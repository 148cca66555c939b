"""Optimizers by name: parameter groups, learning rate, and the averaged weights of schedule-free ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrize import is_parametrized

from ssdd.engine.sharding import local, whole


def parameter_groups(named_parameters: Mapping[str, Tensor], modules: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weights of linear and convolution layers are decayed; biases, norms, embeddings, tables are not."""
    layers = [module for module in modules.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    weights = {id(_weight(layer)) for layer in layers}
    decayed = [p for p in named_parameters.values() if id(p) in weights]
    rest = [p for p in named_parameters.values() if id(p) not in weights]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _weight(layer: nn.Module) -> Tensor | None:
    """The trained weight: that of a spectrally normalised layer is computed from it at every access."""
    if is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original
    return layer.weight


def build_optimizer(name: str, groups: list[dict], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """`schedulefree` (RAdamScheduleFree) or `adamw` (fused)."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), fused=True)
    from schedulefree import RAdamScheduleFree

    optimizer = RAdamScheduleFree(groups, lr=lr, betas=tuple(betas))
    optimizer.train()
    return optimizer


def learning_rate(lr: float, step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """Linear warm-up, then `constant` or `cosine` to zero; `step` counts from 0."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


@torch.no_grad()
def averaged_weights(optimizer: torch.optim.Optimizer, named_parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights to evaluate and export.

    A schedule-free optimizer trains y = (1 - beta) z + beta x and evaluates the average x (Defazio et al. 2024); x is
    computed in addition to y and nothing is swapped, so that training does not depend on when it is evaluated. Other
    optimizers evaluate what they train. Of sharded parameters, this process gets its part.
    """
    averages = dict(named_parameters)
    names = {id(p): name for name, p in named_parameters.items()}
    for group in optimizer.param_groups:
        if "weight_sum" not in group:
            continue
        known = [p for p in group["params"] if id(p) in names and "z" in optimizer.state.get(p, {})]
        if known:
            z = [local(optimizer.state[p]["z"]) for p in known]
            averages |= zip(
                (names[id(p)] for p in known),
                torch._foreach_lerp([local(p) for p in known], z, 1 - 1 / group["betas"][0]),
                strict=True,
            )
    return averages


class GradientStep:
    """The way from a step's losses to new weights: scaled where the precision needs it, clipped together, applied.

    max_norm: gradients of all `parameters` together are clipped to this norm; 0 does not clip.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[Tensor],
        max_norm: float,
        scaler: torch.amp.GradScaler,
    ):
        self.optimizer, self.parameters, self.scaler = optimizer, list(parameters), scaler
        self.max_norm = max_norm or math.inf

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, or of a part of it."""
        self.scaler.scale(loss).backward()

    def apply(self, lr: float) -> Tensor:
        """Take the step; returns the norm of the gradients before clipping, a scalar on the device."""
        self.scaler.unscale_(self.optimizer)
        norm = whole(clip_grad_norm_(self.parameters, self.max_norm))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
