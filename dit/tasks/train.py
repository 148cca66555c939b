"""Task `train`: flow matching on a latent cache, one straight page from the first step to the last.

Every random draw of a step comes from one generator seeded by (seed, stream, step) for the whole global batch, of which
each process keeps its rows: a run does not depend on the number of processes, and a resumed run draws what it would
have drawn. Equal bytes are promised for one kind of machine, number of threads and precision (docs/reliability.md).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from dit.config import DiTConfig, TrainingConfig
from dit.objective import step_draws
from dit.tasks.build import (
    AVERAGE,
    build_averages,
    build_network,
    build_objective,
    flop_per_latent,
    loss_weights,
    open_cache,
    trained_on,
)
from dit.tasks.cache_images import CacheImages
from dit.tasks.dry_run import dry_run
from dit.tasks.looks import SampleDecoder, SamplePicture
from dit.tasks.online_fidelity import OnlineFidelity
from ssdd.engine import checkpoint
from ssdd.engine.devices import choose_kernels, peak_memory, to_device
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json
from ssdd.engine.interrupt import StopRequest
from ssdd.engine.log import ProgressLog
from ssdd.engine.optim import build_optimizer, learning_rate
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes, gradients_kept
from ssdd.engine.random import seed_of
from ssdd.engine.recompute import recompute_activations
from ssdd.engine.run import RunDirectory
from ssdd.engine.sharding import gathered, laid_out_as, load_whole, shard, whole
from ssdd.engine.throughput import Throughput
from ssdd.engine.training_checks import check_finite, check_identity, picture_due, rows_a_process
from ssdd.losses.objective import weighted_sum


def run(cfg: DiTConfig) -> dict[str, Any]:
    """Train, or continue, the run `cfg.run_name`; returns what it writes to task_result.json.

    Exits with status 0 after a checkpoint when SIGTERM or SIGUSR1 arrives. UserError before the first step when cache,
    model, batch size or an earlier checkpoint of the same run do not fit together.
    """
    if cfg.dry_run:
        return dry_run(cfg)
    training = cfg.training
    cache = open_cache(cfg)
    processes = Processes.join()
    device, rank, world = processes.device, processes.rank, processes.world
    precision = Precision.resolve(training.mixed_precision, device)
    choose_kernels(cfg.deterministic)
    rows = _rows_a_process(training, world)

    torch.manual_seed(seed_of(cfg.seed, "dit.init"))
    network = build_network(cfg, cache).to(device)
    objective = build_objective(cfg, network).to(device)
    images = None if objective.repa is None else CacheImages(cfg.dataset, cache)
    flop = flop_per_latent(cfg, objective, cache, precision)
    samples = SampleDecoder(cfg, cache, precision) if training.tokenizer else None
    picture = SamplePicture(samples) if samples and training.sample_every != 0 else None
    fidelity = OnlineFidelity(cfg, cache, samples, processes) if training.fidelity_every else None
    shown = copy.deepcopy(network).eval() if picture or fidelity else None  # averaged weights, while they are sampled
    if training.fsdp:
        shard(objective, [[block] for block in network.blocks], device, world)
    parameters = dict(network.named_parameters())
    repa = objective.repa
    heads = {} if repa is None else {f"repa_loss.{name}": p for name, p in repa.named_parameters() if p.requires_grad}
    trainable = [p for p in (*parameters.values(), *heads.values()) if p.requires_grad]
    groups = [{"params": trainable, "weight_decay": training.weight_decay}]
    optimizer = build_optimizer("adamw", groups, training.lr, (0.9, training.beta2))
    averages = build_averages(cfg, parameters)
    logged = ["loss", *objective.terms, "grad_norm"]
    window = torch.zeros(len(logged), device=device)  # their sums since the last line of metrics
    bad_step = torch.full((), -1, device=device)  # first step with a non-finite loss or gradient; read when logging

    # Resume: the state below is all that a step reads, besides the config.
    directory = RunDirectory(cfg.ckpt_dir, cfg.run_name)
    last = directory.checkpoints / "last"
    identity = {**network.config, "cache": cache.manifest["sha256"]}
    identity |= {"seed": cfg.seed, "batch_size": training.batch_size, "averages": list(averages)}
    identity |= {"terms": objective.terms, "repa": vars(cfg.repa) if heads else None}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "window_steps": 0, "metrics": {}}
    if checkpoint.exists(last):
        tensors, state = checkpoint.load(last)
        check_identity(state["identity"], identity, last)
        load_whole(network, tensors["model"])
        for name, average in averages.items():
            average.load(tensors[name], state["ema"])
        checkpoint.load_optimizer(optimizer, tensors["optimizer"], state["optimizer"])
        with torch.no_grad():
            for name, parameter in heads.items():
                parameter.copy_(laid_out_as(parameter, tensors["aux"][name]))
        windows = tensors["aux"]["windows"]
        window.copy_(windows[rank] if len(windows) == world else windows.mean(0))
    start = state["step"]
    if start > training.steps:
        raise UserError(f"{last} is at step {start}, beyond training.steps={training.steps}; choose another run_name")
    if training.grad_checkpoint:
        recompute_activations(network)
    if training.compile:
        network.compile()
    model = objective if training.fsdp else processes.data_parallel(objective)
    scaler = precision.loss_scaler()
    if scaler.is_enabled() and "scaler" in state:
        scaler.load_state_dict(state["scaler"])
    if start == training.steps and directory.result.exists():
        return read_json(directory.result)
    processes.wait()
    if processes.is_main:
        directory.save_config(cfg)
        directory.truncate_metrics(start)
        directory.result.unlink(missing_ok=True)

    metadata = {**network.metadata(), "trained_on": json.dumps(trained_on(cache))}

    def save(names: list[str]) -> None:
        windows = processes.gather(window.unsqueeze(0))  # [world, len(logged)]
        optimizer_tensors, optimizer_values = checkpoint.optimizer_tensors(optimizer)
        groups = {
            "model": network.state_dict(),
            **{name: average.tensors() for name, average in averages.items()},
            "optimizer": optimizer_tensors,
            "aux": {"windows": windows, **heads},
        }
        groups = {name: gathered(group, keep=processes.is_main) for name, group in groups.items()}
        if not processes.is_main:
            return
        state.update(identity=identity, ema=averages[AVERAGE].state(), optimizer=optimizer_values)
        if scaler.is_enabled():
            state["scaler"] = scaler.state_dict()
        checkpoint.save(directory.checkpoints / names[0], groups, state, metadata)
        for name in names[1:]:
            checkpoint.link(directory.checkpoints / names[0], directory.checkpoints / name)
        if training.keep:
            checkpoint.keep_newest(directory.checkpoints, training.keep)

    order = {"batch_size": training.batch_size, "seed": cfg.seed, "start_step": start, "rank": rank, "world": world}
    pixels = itertools.repeat(None) if images is None else images.batches(**order)
    batches = zip(cache.batches(**order), pixels, strict=False)  # both endless
    weights = loss_weights(cfg)
    began = time.perf_counter() - state["seconds"]
    throughput = Throughput(device, precision.name, training.batch_size, flop, world, start)
    progress = ProgressLog(
        training.steps,
        description=f"train {cfg.run_name}",
        run=directory,
        start=start,
        main_process=processes.is_main,
        wandb=training.wandb,
    )
    with StopRequest() as stop, progress:
        progress.message(precision.headline(state))
        state["precision"] = precision.name
        for step in range(start, training.steps):
            # Data and draws of this step.
            (z, y, _), x = throughput.next(batches)  # [b, C, h, w], [b], and for REPA [b, 3, H, W]
            z, y, x = (None if part is None else to_device(part, device) for part in (z, y, x))
            draws = step_draws(cfg, step, (training.batch_size, *z.shape[1:]), device)
            draws = draws.rows(slice(rank * rows, (rank + 1) * rows))
            lr = learning_rate(training.lr, step, training.steps, training.warmup_steps, training.lr_schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Accumulate gradients; processes exchange them in the last part only, sharded ones in each.
            model.train()
            size, sums = rows // training.accumulate, torch.zeros_like(window)
            for first in range(0, rows, size):
                part = slice(first, first + size)
                with gradients_kept(model, part.stop < rows):
                    with precision.autocast():
                        terms = model(z[part], y[part], draws.rows(part), None if x is None else x[part])
                    loss = weighted_sum(terms, weights)
                    scaler.scale(loss / training.accumulate).backward()
                sums[:-1] += torch.stack([loss, *terms.values()]).detach() / training.accumulate

            # Optimise, average.
            scaler.unscale_(optimizer)
            norm = whole(clip_grad_norm_(trainable, training.grad_clip or math.inf))
            sums[-1] = norm
            window += sums
            finite = sums[0].isfinite() & (norm.isfinite() | scaler.is_enabled())  # a scaler skips such steps
            bad_step = torch.where((bad_step < 0) & ~finite, step + 1, bad_step)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            for average in averages.values():
                average.update(parameters)
            done = step + 1
            state.update(step=done, window_steps=state["window_steps"] + 1)
            progress.advance()

            # Log: the only place besides checkpoints that waits for the device.
            stopping = stop.agreed()
            scheduled = done % training.save_every == 0 or done == training.steps
            saving = scheduled or stopping
            logging = done == 1 or done % training.log_freq == 0 or done == training.steps
            if saving or logging:
                check_finite(processes, bad_step, last)
            if logging:
                means = (processes.mean(window) / state["window_steps"]).tolist()
                state["metrics"] = {**dict(zip(logged, means, strict=True)), "lr": lr}
                counts = {"images": done * training.batch_size}
                progress.metrics(done, state["metrics"] | counts | throughput.line(done))
                window.zero_()
                state["window_steps"] = 0

            # Look at samples of the averaged weights.
            drawing = picture is not None and picture_due(training.sample_every, done, scheduled)
            measuring = fidelity is not None and done % training.fidelity_every == 0
            if drawing or measuring:
                with throughput.paused():
                    shown.load_state_dict(gathered(network.state_dict() | averages[AVERAGE].tensors()))
                    if drawing and processes.is_main:
                        progress.picture(done, "samples", picture.draw(shown))
                    if measuring:
                        progress.metrics(done, fidelity.measure(shown))

            # Checkpoint; `last` comes last, for a resumed run does again what comes after it.
            if saving:
                kept = training.keep > 0 and done % training.save_every == 0
                state["seconds"] = time.perf_counter() - began
                with throughput.paused():
                    save([*[checkpoint.step_name(done)] * kept, "last"])
                    processes.wait()
            if stopping and done < training.steps:
                progress.message(f"stopped by a signal after step {done}; the same command continues from {last}")
                raise SystemExit(0)

    result = {
        "task": "train",
        "steps": training.steps,
        "images": training.steps * training.batch_size,
        **state["metrics"],
        "parameters": sum(p.numel() for p in trainable),
        "model": network.config,
        "cache": cache.manifest["sha256"],
        "precision": precision.record(),
        "checkpoint": str(last),
        "seconds": state["seconds"],
        "images_per_s": training.steps * training.batch_size / max(state["seconds"], 1e-9),
        "peak_memory_bytes": peak_memory(device),
    }
    if processes.is_main:
        directory.write_result(result)
    processes.wait()
    return result


def _rows_a_process(training: TrainingConfig, world: int) -> int:
    """Latents of a step that each of `world` processes sees; UserError when the numbers in the config do not work."""
    for key in ("sample_every", "fidelity_every"):
        if getattr(training, key) and training.tokenizer is None:
            raise UserError(f"training.{key} needs training.tokenizer=<checkpoint reference>, which decodes samples")
    for key in ("steps", "save_every", "log_freq"):
        if getattr(training, key) < 1:
            raise UserError(f"training.{key}={getattr(training, key)} must be at least 1")
    if training.t_shift <= 0:
        raise UserError(f"training.t_shift={training.t_shift:g} must be positive; 1 leaves the drawn times alone")
    if training.grad_clip < 0:
        raise UserError(f"training.grad_clip={training.grad_clip:g} must not be negative; 0 switches clipping off")
    if training.fsdp and training.compile:
        raise UserError("training.fsdp=true does not go with compiled networks yet: set training.compile=false")
    return rows_a_process("training.batch_size", training.batch_size, world, training.accumulate)
