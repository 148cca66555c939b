"""The cost of training a tokenizer on this machine, measured with the parts of the training page on random images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ssdd.config import SSDDConfig
from ssdd.engine.cost import cost_page, training_cost, training_lines
from ssdd.engine.ema import Ema, update_averages
from ssdd.engine.optim import GradientStep, averaged_weights
from ssdd.engine.processes import gradients_kept
from ssdd.engine.throughput import count_forward_flop
from ssdd.losses.objective import weighted_sum
from ssdd.tasks.adversary_training import AdversaryTraining
from ssdd.tasks.build import build_tokenizer
from ssdd.tasks.training_images import TrainingImages


def dry_run(
    cfg: SSDDConfig,
    images: TrainingImages,
    model: nn.Module,
    update: GradientStep,
    adversary: AdversaryTraining,
    averages: Mapping[str, Ema],
) -> dict[str, Any]:
    """Print and return parameters, GFLOP per image, memory, seconds per step and total hours, with all losses active.

    The arguments are those that the training page takes its steps with, `model` being the objective or its wrapper.
    """
    network, precision = getattr(model, "module", model).tokenizer, adversary.precision
    batch, parameters = images.made_up(network), {n: p for n, p in network.named_parameters() if p.requires_grad}

    def step() -> None:
        adversary.begin(bool(adversary.terms))
        for part in images.parts:
            more = part.stop < images.rows
            x, draws, stored = batch.rows(part)
            with gradients_kept(model, more):
                with precision.autocast():
                    terms, predicted = model(x, draws, None, *stored)
                loss = weighted_sum(terms, vars(cfg.losses)) / cfg.training.grad_accumulate
                update.backward(loss)
            adversary.backward(x, predicted, more)
        update.apply(cfg.training.lr)
        adversary.apply(cfg.training.lr)
        update_averages(averages, averaged_weights(update.optimizer, parameters))

    whole = build_tokenizer(cfg)  # the trained one may be compiled or sharded
    x = torch.zeros(1, 3, cfg.dataset.im_size, cfg.dataset.im_size)
    z = torch.zeros(1, whole.z_dim, *(side // whole.f for side in x.shape[2:]))
    encoding = count_forward_flop(lambda: whole.encode(x).mode())
    decoding = count_forward_flop(lambda: whole.decode(z, steps=1))
    result = {
        "parameters": {
            "encoder": sum(p.numel() for p in network.encoder.parameters()),
            "decoder": sum(p.numel() for p in network.decoder.parameters()),
            "trained": sum(p.numel() for p in update.parameters),
        },
        "gflop_encode": encoding / 1e9,
        "gflop_decode_step": decoding / 1e9,
        **training_cost(images.steps, step, precision),
    }
    counts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in result["parameters"].items())
    gflop = f"encode {result['gflop_encode']:.1f}, decode step {result['gflop_decode_step']:.1f} per image"
    part = f"{images.rows // len(images.parts)} images"
    images.processes.print(cost_page({"parameters": counts, "GFLOP": gflop, **training_lines(result, part)}))
    return result
