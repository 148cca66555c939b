"""The cost of training a generator on this machine, measured with the parts of the training page on random latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit.config import DiTConfig
from dit.tasks.build import loss_weights
from dit.tasks.training_latents import TrainingLatents
from ssdd.engine.cost import cost_page, training_cost, training_lines
from ssdd.engine.ema import Ema, update_averages
from ssdd.engine.optim import GradientStep
from ssdd.engine.precision import Precision
from ssdd.engine.processes import gradients_kept
from ssdd.losses.objective import weighted_sum


def dry_run(
    cfg: DiTConfig,
    latents: TrainingLatents,
    model: nn.Module,
    update: GradientStep,
    averages: Mapping[str, Ema],
    precision: Precision,
    flop: int,
) -> dict[str, Any]:
    """Print and return parameters, GFLOP per latent, memory, seconds per step and total hours.

    The arguments are those that the training page takes its steps with, `model` being the objective or its wrapper.
    flop: of one latent, forward and backward.
    """
    training, weights, batch = cfg.training, loss_weights(cfg), latents.made_up()
    parameters = dict(getattr(model, "module", model).network.named_parameters())

    def step() -> None:
        for part in latents.parts:
            with gradients_kept(model, part.stop < latents.rows):
                with precision.autocast():
                    loss = weighted_sum(model(*batch.rows(part)), weights)
                update.backward(loss / training.grad_accumulate)
        update.apply(training.lr)
        update_averages(averages, parameters)

    result = {
        "parameters": sum(p.numel() for p in parameters.values() if p.requires_grad),
        "gflop_latent": flop / 1e9,
        **training_cost(training.steps, step, precision),
    }
    lines = {
        "parameters": f"{result['parameters'] / 1e6:.2f} M, latents {' x '.join(map(str, latents.cache.latent_shape))}",
        "GFLOP": f"{result['gflop_latent']:.2f} per training latent",
    }
    part = f"{latents.rows // len(latents.parts)} latents"
    latents.processes.print(cost_page(lines | training_lines(result, part)))
    return result
