"""Task `train`: flow matching on a latent cache, one straight page from the first step to the last.

Every random draw of a step comes from one generator seeded by (seed, stream, step) for the whole global batch, of which
each process keeps its rows: a run does not depend on the number of processes, and a resumed run draws what it would
have drawn.
"""

from __future__ import annotations

import copy
import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dit.config import DiTConfig, TrainingConfig
from dit.model import DiT
from dit.pictures import SamplePicture
from latent_cache import LatentDataset, StreamingLatents
from ssdd.engine import checkpoint
from ssdd.engine.ema import Ema
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json
from ssdd.engine.interrupt import StopRequest
from ssdd.engine.log import ProgressLog
from ssdd.engine.noise import batch_generator, seed_of
from ssdd.engine.optim import learning_rate
from ssdd.engine.recompute import recompute_activations
from ssdd.engine.run import RunDirectory
from ssdd.engine.sharding import gathered, load_whole, shard, whole
from ssdd.engine.throughput import Throughput, count_flop
from ssdd.engine.training import (
    check_finite,
    check_identity,
    open_accelerator,
    peak_memory,
    picture_due,
    rows_a_process,
)
from ssdd.flow import interpolate, logit_normal_t, uniform_t, velocity_target


@dataclass
class Draws:
    """The random numbers of one step, for the whole global batch of B latents."""

    t: Tensor  # float32 [B] in [0, 1]
    eps: Tensor  # float32 [B, C, h, w]
    drop: Tensor  # bool [B], labels to replace by the null class

    def rows(self, part: slice) -> Draws:
        return Draws(self.t[part], self.eps[part], self.drop[part])


def step_draws(cfg: DiTConfig, step: int, shape: tuple[int, ...], device: torch.device) -> Draws:
    """The draws of step `step` for latents [B, C, h, w]; a function of the seed and the step alone."""
    generator = batch_generator(device, cfg.seed, "dit.train", step)
    training, batch = cfg.training, shape[0]
    if training.t_sampling == "uniform":
        t = uniform_t(batch, generator)
    else:
        t = logit_normal_t(batch, generator, training.t_mean, training.t_std)
    eps = torch.randn(shape, generator=generator, device=device)
    drop = torch.rand(batch, generator=generator, device=device) < cfg.model.class_dropout
    return Draws(t, eps, drop)


def velocity_loss(model: torch.nn.Module, z: Tensor, y: Tensor, draws: Draws, network: DiT) -> Tensor:
    """Mean squared error of the velocity x - eps at x_t, a float32 scalar; `model` is `network`, perhaps wrapped."""
    labels = torch.where(draws.drop, network.num_classes, y)
    out = model(interpolate(z, draws.eps, draws.t), draws.t * network.time_scale, labels)
    return (out[:, : network.in_channels].float() - velocity_target(z, draws.eps)).square().mean()


def run(cfg: DiTConfig) -> dict[str, Any]:
    """Train, or continue, the run `cfg.run_name`; returns what it writes to task_result.json.

    Exits with status 0 after a checkpoint when SIGTERM or SIGUSR1 arrives. UserError before the first step when cache,
    model, batch size or an earlier checkpoint of the same run do not fit together.
    """
    training = cfg.training
    cache = _open_cache(cfg)
    accelerator = open_accelerator(training.mixed_precision, cfg.deterministic)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    rows = _rows_a_process(training, world)

    torch.manual_seed(seed_of(cfg.seed, "dit.init"))
    network = _new_network(cfg, cache).to(device)
    flop = _flop_per_latent(cfg, network, cache, accelerator)
    picture = SamplePicture(cfg, cache, accelerator) if training.tokenizer and training.sample_every != 0 else None
    shown = copy.deepcopy(network).eval() if picture else None  # the averaged weights, while they are sampled
    if training.fsdp:
        shard(network, [[block] for block in network.blocks], device, world)
    trainable = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=training.lr, betas=(0.9, training.beta2), weight_decay=training.weight_decay, fused=True
    )
    ema = Ema(dict(network.named_parameters()), training.ema.decay, min(training.ema.start_iter, training.steps // 10))
    window = torch.zeros(2, device=device)  # sums of loss and gradient norm since the last line of metrics
    bad_step = torch.full((), -1, device=device)  # first step with a non-finite loss or gradient; read when logging

    # Resume: the state below is all that a step reads, besides the config.
    directory = RunDirectory(cfg.ckpt_dir, cfg.run_name)
    last = directory.checkpoints / "last"
    identity = {**network.config, "cache": cache.manifest["sha256"]}
    identity |= {"seed": cfg.seed, "batch_size": training.batch_size}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "window_steps": 0, "metrics": {}}
    if checkpoint.exists(last):
        tensors, state = checkpoint.load(last)
        check_identity(state["identity"], identity, last)
        load_whole(network, tensors["model"])
        ema.load(tensors["model_ema"], state["ema"])
        checkpoint.load_optimizer(optimizer, tensors["optimizer"], state["optimizer"])
        windows = tensors["aux"]["windows"]
        window.copy_(windows[rank] if len(windows) == world else windows.mean(0))
    start = state["step"]
    if start > training.steps:
        raise UserError(f"{last} is at step {start}, beyond training.steps={training.steps}; choose another run_name.")
    if training.grad_checkpoint:
        recompute_activations(network)
    if training.compile:
        network.compile()
    model = accelerator.prepare_model(network, evaluation_mode=training.fsdp)  # which is: without DDP around it
    optimizer = accelerator.prepare_optimizer(optimizer)
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    if start == training.steps and directory.result.exists():
        return read_json(directory.result)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        directory.save_config(cfg)
        directory.truncate_metrics(start)
        directory.result.unlink(missing_ok=True)

    metadata = {**network.metadata(), "trained_on": json.dumps(_trained_on(cache))}
    parameters = dict(network.named_parameters())

    def save(names: list[str]) -> None:
        windows = accelerator.gather(window.unsqueeze(0))  # [world, 2]
        optimizer_tensors, optimizer_values = checkpoint.optimizer_tensors(optimizer.optimizer)
        groups = {
            "model": network.state_dict(),
            "model_ema": ema.tensors(),
            "optimizer": optimizer_tensors,
            "aux": {"windows": windows},
        }
        groups = {name: gathered(group, keep=accelerator.is_main_process) for name, group in groups.items()}
        if not accelerator.is_main_process:
            return
        state.update(identity=identity, ema=ema.state(), optimizer=optimizer_values)
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        checkpoint.save(directory.checkpoints / names[0], groups, state, metadata)
        for name in names[1:]:
            checkpoint.link(directory.checkpoints / names[0], directory.checkpoints / name)
        if training.keep:
            checkpoint.keep_newest(directory.checkpoints, training.keep)

    batches = cache.batches(training.batch_size, seed=cfg.seed, start_step=start, rank=rank, world=world)
    began = time.perf_counter() - state["seconds"]
    throughput = Throughput(device, accelerator.mixed_precision, training.batch_size, flop, world, start)
    progress = ProgressLog(
        training.steps,
        description=f"train {cfg.run_name}",
        run=directory,
        start=start,
        main_process=accelerator.is_main_process,
        wandb=training.wandb,
    )
    with StopRequest() as stop, progress:
        for step in range(start, training.steps):
            # Data and draws of this step.
            z, y, _ = throughput.next(batches)  # [b, C, h, w], [b]
            z, y = z.to(device, non_blocking=True), y.to(device, non_blocking=True)
            draws = step_draws(cfg, step, (training.batch_size, *z.shape[1:]), device)
            draws = draws.rows(slice(rank * rows, (rank + 1) * rows))
            lr = learning_rate(training.lr, step, training.steps, training.warmup_steps, "constant")
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Accumulate gradients; processes exchange them in the last part only, sharded ones in each.
            model.train()
            size, step_loss = rows // training.accumulate, 0.0
            for first in range(0, rows, size):
                part = slice(first, first + size)
                with nullcontext() if part.stop == rows else accelerator.no_sync(model):
                    loss = velocity_loss(model, z[part], y[part], draws.rows(part), network) / training.accumulate
                    accelerator.backward(loss)
                step_loss = step_loss + loss.detach()

            # Optimise, average.
            norm = whole(accelerator.clip_grad_norm_(trainable, training.grad_clip or math.inf))
            window += torch.stack([step_loss, norm])
            finite = step_loss.isfinite() & (norm.isfinite() | (accelerator.scaler is not None))  # a scaler skips those
            bad_step = torch.where((bad_step < 0) & ~finite, step + 1, bad_step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(parameters)
            done = step + 1
            state.update(step=done, window_steps=state["window_steps"] + 1)
            progress.advance()

            # Log: the only place besides checkpoints that waits for the device.
            stopping = stop.agreed()
            saving = stopping or done % training.save_every == 0 or done == training.steps
            logging = done == 1 or done % training.log_freq == 0 or done == training.steps
            if saving or logging:
                check_finite(accelerator, bad_step, last)
            if logging:
                loss_mean, norm_mean = (accelerator.reduce(window, "mean") / state["window_steps"]).tolist()
                values = {"loss": loss_mean, "grad_norm": norm_mean, "lr": lr}
                state["metrics"] = values
                counts = {"images": done * training.batch_size}
                progress.metrics(done, values | counts | throughput.line(done))
                window.zero_()
                state["window_steps"] = 0

            # Draw samples of the averaged weights.
            if picture is not None and picture_due(training.sample_every, done, saving):
                with throughput.paused():
                    shown.load_state_dict(gathered(network.state_dict() | ema.tensors()))
                    if accelerator.is_main_process:
                        progress.picture(done, "samples", picture.draw(shown))

            # Checkpoint; `last` comes last, for a resumed run does again what comes after it.
            if saving:
                kept = training.keep > 0 and done % training.save_every == 0
                state["seconds"] = time.perf_counter() - began
                with throughput.paused():
                    save([*[checkpoint.step_name(done)] * kept, "last"])
                    accelerator.wait_for_everyone()
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
        "checkpoint": str(last),
        "seconds": state["seconds"],
        "images_per_s": training.steps * training.batch_size / max(state["seconds"], 1e-9),
        "peak_memory_bytes": peak_memory(device),
    }
    if accelerator.is_main_process:
        directory.write_result(result)
    accelerator.wait_for_everyone()
    return result


def _open_cache(cfg: DiTConfig) -> LatentDataset | StreamingLatents:
    if cfg.cache is None:
        raise UserError("cache=DIR must be given: the folder that `python -m latent_cache build out=DIR` wrote.")
    if "://" not in cfg.cache:
        return LatentDataset(cfg.cache, split="train")
    if cfg.cache_dir is None:
        raise UserError(f"cache={cfg.cache} is a URL: cache_dir=DIR must be given, a local folder for its shards.")
    return StreamingLatents(cfg.cache, split="train", cache_dir=cfg.cache_dir)


def _rows_a_process(training: TrainingConfig, world: int) -> int:
    """Latents of a step that each of `world` processes sees; UserError when the numbers in the config do not work."""
    if training.sample_every and training.tokenizer is None:
        raise UserError("training.sample_every needs training.tokenizer=<checkpoint reference>, which decodes samples.")
    for key in ("steps", "save_every", "log_freq"):
        if getattr(training, key) < 1:
            raise UserError(f"training.{key}={getattr(training, key)} must be at least 1.")
    if training.fsdp and training.compile:
        raise UserError("training.fsdp=true does not go with compiled networks yet: set training.compile=false.")
    return rows_a_process("training.batch_size", training.batch_size, world, training.accumulate)


def _new_network(cfg: DiTConfig, cache: LatentDataset | StreamingLatents) -> DiT:
    if not 0.0 <= cfg.model.class_dropout < 1.0:
        raise UserError(f"model.class_dropout={cfg.model.class_dropout} must be in [0, 1).")
    channels, height, width = cache.latent_shape
    try:
        return DiT.from_name(
            cfg.model.name,
            input_size=(height, width),
            in_channels=channels,
            num_classes=cache.num_classes,
            learn_sigma=cfg.model.learn_sigma,
            null_class=cfg.model.class_dropout > 0,
            time_scale=cfg.model.time_scale,
            qk_norm=cfg.model.qk_norm,
            rms_norm=cfg.model.rms_norm,
            swiglu=cfg.model.swiglu,
            rope=cfg.model.rope,
            wo_shift=cfg.model.wo_shift,
        )
    except UserError as error:
        raise UserError(f"model.name={cfg.model.name} does not fit the cache {cfg.cache}: {error}") from None


def _flop_per_latent(
    cfg: DiTConfig, network: DiT, cache: LatentDataset | StreamingLatents, accelerator: Accelerator
) -> int:
    """FLOP of one training latent, forward and backward."""
    z = torch.zeros(1, *cache.latent_shape, device=accelerator.device)
    y, draws = torch.zeros(1, dtype=torch.int64, device=z.device), step_draws(cfg, 0, tuple(z.shape), z.device)
    trainable = [p for p in network.parameters() if p.requires_grad]
    with accelerator.autocast():
        return count_flop(lambda: velocity_loss(network, z, y, draws, network), trainable)


def _trained_on(cache: LatentDataset | StreamingLatents) -> dict[str, Any]:
    """What sampling and decoding need to know of the cache, so that a weights file is enough for both."""
    return {"cache": cache.manifest["sha256"], "z_stats": cache.norm.to_dict(), "class_names": cache.class_names}
