"""The cost of training a generator on this machine, measured on a few steps of random latents."""

from __future__ import annotations

from typing import Any

import torch

from dit.config import DiTConfig
from dit.objective import step_draws
from dit.tasks.build import build_network, build_objective, flop_per_latent, loss_weights, open_cache
from ssdd.engine.devices import choose_kernels, peak_memory
from ssdd.engine.ema import build_averages, update_averages
from ssdd.engine.optim import build_optimizer
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.recompute import recompute_activations
from ssdd.engine.throughput import seconds_a_call
from ssdd.engine.training_checks import rows_a_process
from ssdd.losses.objective import weighted_sum


def dry_run(cfg: DiTConfig) -> dict[str, Any]:
    """Print and return parameters, GFLOP per latent, memory, seconds per step and total hours; nothing is written.

    Of several processes each measures its own share, without what they would exchange, and as if training.fsdp=false.
    """
    training = cfg.training
    cache = open_cache(cfg)
    processes = Processes.join()
    device, world = processes.device, processes.world
    precision = Precision.resolve(training.mixed_precision, device)
    choose_kernels()
    parts = training.grad_accumulate
    rows = rows_a_process("training.batch_size", training.batch_size, world, parts) // parts
    network = build_network(cfg, cache).to(device)
    objective = build_objective(cfg, network).to(device)
    flop = flop_per_latent(cfg, objective, cache, precision)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = build_optimizer("adamw", [{"params": trained}], training.lr, training.betas)
    averages = build_averages(training.ema, dict(network.named_parameters()), training.steps)
    weights = loss_weights(cfg)
    if training.grad_checkpoint:
        recompute_activations(network)
    if training.compile:
        network.compile()
    z, y = torch.randn(rows, *cache.latent_shape, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    draws = step_draws(cfg, 0, tuple(z.shape), device)
    side = cfg.dataset.im_size
    images = None if objective.repa is None else torch.zeros(rows, 3, side, side, device=device)

    def part() -> None:
        with precision.autocast():
            loss = weighted_sum(objective(z, y, draws, images), weights)
        loss.backward()

    def update() -> None:
        optimizer.step()
        update_averages(averages, dict(network.named_parameters()))

    step_seconds = parts * seconds_a_call(device, part) + seconds_a_call(device, update)
    result = {
        "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "gflop_latent": flop / 1e9,
        "peak_memory_bytes": peak_memory(device),
        "seconds_a_step": step_seconds,
        "steps": training.steps,
        "precision": precision.record(),
        "hours": training.steps * step_seconds / 3600,
    }
    if processes.is_main:
        print(f"parameters: {result['parameters'] / 1e6:.2f} M, latents {' x '.join(map(str, cache.latent_shape))}")
        print(f"GFLOP per training latent: {result['gflop_latent']:.2f}")
        print(f"memory: {result['peak_memory_bytes'] / 2**30:.2f} GiB for {rows} latents per process and part")
        print(f"time: {step_seconds:.3f} s per step, {training.steps} steps, {result['hours']:.2f} hours")
    return result
