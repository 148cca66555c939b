"""Task `train`: flow matching on a latent cache, one straight page from the first step to the last.

Every random draw of a step comes from one generator seeded by (seed, stream, step) for the whole global batch, of which
each process keeps its rows: a run does not depend on the number of processes, and a resumed run draws what it would
have drawn. Equal bytes are promised for one kind of machine, number of threads and precision (docs/reliability.md).
"""

from __future__ import annotations

import json
from typing import Any

import torch

from dit.config import DiTConfig
from dit.tasks.build import build_network, build_objective, flop_per_latent, loss_weights, open_cache, trained_on
from dit.tasks.dry_run import dry_run
from dit.tasks.sample_monitor import SampleMonitor
from dit.tasks.training_latents import TrainingLatents
from ssdd.engine import checkpoint
from ssdd.engine.devices import choose_kernels, peak_memory
from ssdd.engine.ema import AVERAGE, build_averages, update_averages
from ssdd.engine.errors import UserError
from ssdd.engine.interrupt import StopRequest
from ssdd.engine.optim import GradientStep, build_optimizer, learning_rate, parameter_groups
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes, gradients_kept
from ssdd.engine.random import seed_of
from ssdd.engine.recompute import recompute_activations
from ssdd.engine.run import RunDirectory
from ssdd.engine.running_means import RunningMeans
from ssdd.engine.sharding import shard
from ssdd.engine.state import Auxiliary, Average, OptimizerState, TrainingState, Weights
from ssdd.engine.throughput import Throughput
from ssdd.engine.training_checks import FirstBadStep, check_training
from ssdd.losses.objective import weighted_sum
from ssdd.losses.repa import trained_heads


def run(cfg: DiTConfig) -> dict[str, Any]:
    """Train, or continue, the run `cfg.run_name`; returns what it writes to task_result.json, or what a dry run found.

    Exits with status 0 after a checkpoint when SIGTERM or SIGUSR1 arrives. UserError before the first step when cache,
    model, batch size or an earlier checkpoint of the same run do not fit together.
    """
    training, processes = cfg.training, Processes.join()
    device, world, steps = processes.device, processes.world, training.steps
    precision = Precision.resolve(training.mixed_precision, device)
    choose_kernels(cfg.deterministic)
    check(cfg)
    directory, cache = RunDirectory(cfg.ckpt_dir, cfg.run_name), open_cache(cfg)
    latents = TrainingLatents(cfg, cache, processes, with_images=cfg.losses.repa != 0)
    identity = {"cache": cache.manifest["sha256"], "seed": cfg.seed, "batch_size": latents.batch_size}
    if result := processes.agree(lambda: directory.finished(cfg, identity)):
        return result

    # Networks, and what trains them.
    torch.manual_seed(seed_of(cfg.seed, "dit.init"))
    network = build_network(cfg, cache).to(device)
    objective = build_objective(cfg, network).to(device)
    flop = flop_per_latent(cfg, objective, cache, precision)
    monitor = SampleMonitor(cfg, cache, network, processes, precision)
    if training.fsdp:
        shard(objective, [[block] for block in network.blocks], device, world)
    parameters, heads = dict(network.named_parameters()), trained_heads(objective.repa)
    trained = {name: p for name, p in (parameters | heads).items() if p.requires_grad}
    groups = parameter_groups(trained, objective, training.weight_decay)
    optimizer = build_optimizer("adamw", groups, training.lr, training.betas)
    scaler = precision.loss_scaler()
    update = GradientStep(optimizer, trained.values(), training.grad_clip, scaler)
    averages = build_averages(training.ema, parameters, steps)
    means = RunningMeans(["loss", *objective.terms, "grad_norm"], device)
    bad = FirstBadStep(device)
    if training.grad_checkpoint:
        recompute_activations(network)
    if training.compile:
        network.compile()
    model = objective if training.fsdp else processes.data_parallel(objective)
    if cfg.dry_run:
        return dry_run(cfg, latents, model, update, averages, precision, flop)

    # Resume: the state has all that a step reads, besides the config.
    identity |= {**network.config, "averages": list(averages), "terms": objective.terms}
    identity |= {"repa": vars(cfg.aux_losses.repa) if heads else None}
    parts = {
        "model": Weights(network),
        **{name: Average(average) for name, average in averages.items()},
        "optimizer": OptimizerState(optimizer),
        "aux": Auxiliary(heads, means, scaler, processes),
    }
    metadata = {**network.metadata(), "trained_on": json.dumps(trained_on(cache))}
    state = TrainingState(directory, processes, identity, parts, metadata, precision, training.keep)
    state.restore(steps)
    if state.step == steps and (result := processes.agree(directory.training_result)):
        return result
    if processes.is_main:
        directory.begin(cfg, state.step)
    batches, weights = latents.read(state.step), loss_weights(cfg)
    throughput = Throughput(device, precision.name, latents.batch_size, flop, world, state.step)
    with StopRequest() as stop, state.log(steps, f"train {cfg.run_name}", training.wandb) as progress:
        progress.message(state.headline())
        for step in range(state.step, steps):
            # Data and draws of this step.
            batch = latents.batch(throughput.next(batches), step)
            lr = learning_rate(training.lr, step, steps, training.warmup_steps, training.lr_schedule)

            # Accumulate gradients; processes exchange them in the last part only, sharded ones in each.
            for part in latents.parts:
                with gradients_kept(model, part.stop < latents.rows):
                    with precision.autocast():
                        terms = model(*batch.rows(part))
                    loss = weighted_sum(terms, weights)
                    update.backward(loss / training.grad_accumulate)
                means.add({"loss": loss, **terms}, 1 / training.grad_accumulate)
                bad.add(loss)

            # Optimise, average.
            norm = update.apply(lr)
            bad.add(None if scaler.is_enabled() else norm)  # a scaler skips such steps
            update_averages(averages, parameters)
            state.step = done = step + 1
            means.add({"grad_norm": norm})
            means.count(means.names)
            bad.end(done)
            progress.advance()

            # Log: the only place besides evaluations and checkpoints that waits for the device.
            stopping, ended = stop.agreed(), done == steps
            scheduled = ended or done % training.save_every == 0
            logging = done == 1 or done % training.log_freq == 0 or ended
            saving = scheduled or stopping
            if logging or saving:
                bad.check(processes, directory.last)
            if logging:
                state.metrics = means.read(processes) | {"lr": lr}
                counts = {"images": done * latents.batch_size}
                progress.metrics(done, state.metrics | counts | throughput.line(done))

            # Evaluate what the averaged weights make, and draw it.
            if monitor.due(done, scheduled):
                with throughput.paused():
                    monitor.take(done, scheduled, averages[AVERAGE].tensors(), progress)

            # Checkpoint; `last` comes last, for a resumed run does again what comes after it.
            if saving:
                kept = training.keep > 0 and done % training.save_every == 0
                with throughput.paused():
                    state.save(*[checkpoint.step_name(done)] * kept, "last")
            if stopping and not ended:
                progress.message(f"stopped by a signal after step {done}; the same command continues")
                raise SystemExit(0)

    result = {"task": "train", **state.result(steps, latents.batch_size, trained.values()), "model": network.config}
    result |= {"cache": cache.manifest["sha256"], "peak_memory_bytes": peak_memory(device)}
    if processes.is_main:
        directory.write_result(result)
    processes.wait()
    return result


def check(cfg: DiTConfig) -> None:
    """UserError for numbers that no run can work with."""
    training = cfg.training
    check_training(training, {"steps": training.steps})
    for key in ("sample_every", "fidelity_every"):
        if getattr(training, key) and training.tokenizer is None:
            raise UserError(f"training.{key} needs training.tokenizer=<checkpoint reference>, which decodes samples")
    if training.t_shift <= 0:
        raise UserError(f"training.t_shift={training.t_shift:g} must be positive; 1 leaves the drawn times unchanged")
