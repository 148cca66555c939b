"""The cost of a training run on this machine, measured on a few steps of random images."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ssdd.config import SSDDConfig
from ssdd.engine.devices import choose_kernels, peak_memory
from ssdd.engine.optim import build_optimizer, parameter_groups
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.recompute import recompute_activations
from ssdd.engine.throughput import seconds_a_call
from ssdd.images.batches import steps_per_epoch
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import open_source
from ssdd.losses.objective import step_draws, weighted_sum
from ssdd.tasks.build import build_discriminator, build_objective, build_tokenizer


def dry_run(cfg: SSDDConfig) -> dict[str, Any]:
    """Print and return parameters, GFLOP per image, memory, seconds per step and total hours; nothing is written."""
    processes = Processes.join()
    device, world = processes.device, processes.world
    precision = Precision.resolve(cfg.training.mixed_precision, device)
    choose_kernels()
    rows = max(1, cfg.dataset.batch_size // world // cfg.training.grad_accumulate)
    dataset = ImageDataset(open_source(cfg.dataset, "train"), cfg.dataset, train=True)
    steps = cfg.training.steps or cfg.training.epochs * steps_per_epoch(dataset, cfg.dataset.batch_size)
    network, discriminator = build_tokenizer(cfg).to(device), build_discriminator(cfg, precision)
    objective = build_objective(cfg, network, discriminator).to(device)
    stored = cfg.distill_teacher and cfg.distill.targets == "cache"
    if discriminator is not None:
        discriminator.to(device)
    parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(cfg.training.optimizer, parameter_groups(parameters, objective, 0.0), 0.0, (0.9, 0.99))
    side, latent = cfg.dataset.im_size, (network.z_dim, *(cfg.dataset.im_size // network.f,) * 2)
    x = torch.rand(rows, 3, side, side, device=device).contiguous(memory_format=torch.channels_last) * 2 - 1
    draws = step_draws(0, 0, tuple(x.shape), (rows, *latent), device)

    with torch.no_grad(), FlopCounterMode(display=False) as encoding:
        z = network.encode(x[:1]).mode()
    with FlopCounterMode(display=False) as decoding:
        network.decode(z, steps=1)
    given = [(torch.zeros(rows, *latent, device=device), x)] if stored else []
    if cfg.training.grad_checkpoint:
        recompute_activations(network)
    if cfg.training.compile:
        network.compile()

    def step() -> None:
        with precision.autocast():
            terms, predicted = objective(x, draws, None, *given)
            loss = weighted_sum(terms, vars(cfg.losses))
        loss.backward()
        if discriminator is not None:
            with precision.autocast():
                loss = discriminator(x, *predicted)
            loss.backward()
            discriminator.zero_grad(set_to_none=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step_seconds = seconds_a_call(device, step) * cfg.training.grad_accumulate
    result = {
        "parameters": {
            "encoder": sum(p.numel() for p in network.encoder.parameters()),
            "decoder": sum(p.numel() for p in network.decoder.parameters()),
            "trained": sum(p.numel() for p in parameters.values()),
        },
        "gflop_encode": encoding.get_total_flops() / 1e9,
        "gflop_decode_step": decoding.get_total_flops() / 1e9,
        "peak_memory_bytes": peak_memory(device),
        "seconds_a_step": step_seconds,
        "steps": steps,
        "precision": precision.record(),
        "hours": steps * step_seconds / 3600,
    }
    if processes.is_main:
        counts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in result["parameters"].items())
        print(f"parameters: {counts}")
        print(f"GFLOP per image: encode {result['gflop_encode']:.1f}, decode step {result['gflop_decode_step']:.1f}")
        print(f"memory: {result['peak_memory_bytes'] / 2**30:.2f} GiB for {rows} images per process and part")
        print(f"time: {step_seconds:.3f} s per step, {steps} steps, {result['hours']:.2f} hours without evaluations")
    return result
