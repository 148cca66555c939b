"""Task `train`: train or distil the tokenizer, one straight page from the first step to the last.

Every random draw of a step comes from one generator seeded by (seed, step) for the whole global batch, of which each
process keeps its rows: a run does not depend on the number of processes, and a resumed run draws what it would have
drawn. Averaged weights are computed beside the trained ones: no byte depends on when anyone looks. Equal bytes are
promised for one kind of machine, number of threads and precision (docs/reliability.md).
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from ssdd.config import SSDDConfig
from ssdd.engine import checkpoint
from ssdd.engine.devices import choose_kernels, peak_memory
from ssdd.engine.ema import Ema
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file
from ssdd.engine.interrupt import StopRequest
from ssdd.engine.log import ProgressLog
from ssdd.engine.optim import averaged_weights, build_optimizer, learning_rate, parameter_groups
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes, gradients_kept
from ssdd.engine.random import seed_of
from ssdd.engine.recompute import recompute_activations
from ssdd.engine.run import RunDirectory
from ssdd.engine.sharding import gathered, laid_out_as, load_whole, shard, whole
from ssdd.engine.throughput import Throughput
from ssdd.engine.training_checks import check_finite, check_identity, picture_due, rows_a_process
from ssdd.images.batches import steps_per_epoch, train_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import open_source
from ssdd.losses.objective import step_draws, weighted_sum
from ssdd.model.compared_decoders import Row
from ssdd.tasks.build import (
    build_discriminator,
    build_objective,
    build_targets,
    build_tokenizer,
    flop_per_image,
    sharded_blocks,
)
from ssdd.tasks.dry_run import dry_run
from ssdd.tasks.evaluate import Evaluation
from ssdd.tasks.looks import ReconstructionPicture


def run(cfg: SSDDConfig) -> dict[str, Any]:
    """Train, or continue, the run `cfg.run_name`; returns what it writes to task_result.json.

    Exits with status 0 after a checkpoint when SIGTERM or SIGUSR1 arrives. UserError before the first step when data,
    weights, batch size or an earlier checkpoint of the same run do not fit together.
    """
    if cfg.dry_run:
        return dry_run(cfg)
    training = cfg.training
    processes = Processes.join()
    device, rank, world = processes.device, processes.rank, processes.world
    precision = Precision.resolve(training.mixed_precision, device)
    choose_kernels(cfg.deterministic)
    batch_size = cfg.dataset.batch_size
    rows = rows_a_process("dataset.batch_size", batch_size, world, training.grad_accumulate)

    stored = cfg.distill_teacher and cfg.distill.targets == "cache"  # then every epoch sees the same crops
    dataset = ImageDataset(open_source(cfg.dataset, "train"), cfg.dataset, train=not stored, seed=cfg.seed)
    epoch_steps = steps_per_epoch(dataset, batch_size)
    steps = training.epochs * epoch_steps if training.steps is None else training.steps
    _check(cfg, steps)

    torch.manual_seed(seed_of(cfg.seed, "ssdd.init"))
    network = build_tokenizer(cfg).to(device)
    discriminator = build_discriminator(cfg)
    objective = build_objective(cfg, network, discriminator).to(device)
    if cfg.distill_teacher or cfg.objective == "direct":
        network.config["fm_sampler"]["steps"] = 1  # what the decoder is trained for, and decode's default in its file
    flop = flop_per_image(cfg, objective, precision)
    evaluation = Evaluation(cfg, processes, precision) if training.eval_freq else None
    drawn = training.sample_every or (training.sample_every is None and evaluation is not None)
    picture = ReconstructionPicture(cfg, precision) if drawn else None
    shown = copy.deepcopy(network) if evaluation or picture else None  # the averaged weights, while they are looked at
    if training.fsdp:
        shard(objective, sharded_blocks(network), device, world)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    repa = getattr(objective, "repa", None)
    heads = {} if repa is None else {f"repa_loss.{name}": p for name, p in repa.named_parameters() if p.requires_grad}
    groups = parameter_groups(parameters | heads, objective, training.weight_decay)
    optimizer = build_optimizer(training.optimizer, groups, training.lr, training.betas)
    if discriminator is not None:
        discriminator.to(device)
        gan_groups = parameter_groups(dict(discriminator.named_parameters()), discriminator, training.weight_decay)
        gan_optimizer = build_optimizer(training.optimizer, gan_groups, training.lr, training.betas)
    ema = Ema(parameters, cfg.ssdd.ema.decay, min(cfg.ssdd.ema.start_iter, steps // 10))
    logged = [*objective.terms, *["gan_train"] * (discriminator is not None), "grad_norm"]
    window = torch.zeros(len(logged), device=device)  # their sums since the last line
    bad_step = torch.full((), -1, device=device)  # first step with a non-finite loss or gradient; read when logging

    # Resume: the state below is all that a step reads, besides the config.
    directory = RunDirectory(cfg.ckpt_dir, cfg.run_name)
    last = directory.checkpoints / "last"
    identity = {"encoder": network.config["encoder"], "decoder": network.config["decoder"]}
    identity |= {"data": dataset.source.fingerprint(), "seed": cfg.seed, "batch_size": batch_size, "steps": steps}
    identity |= {"optimizer": training.optimizer, "objective": cfg.objective, "terms": objective.terms}
    if cfg.distill_teacher:
        teacher = sha256_file(checkpoint.resolve(str(cfg.ssdd.checkpoint), cfg.ckpt_dir))
        identity |= {"teacher": [teacher, network.encoder_fingerprint()], "sampler": vars(cfg.ssdd.fm_sampler)}
        identity |= {"distill": vars(cfg.distill)}
    if stored:
        targets = build_targets(cfg, objective, dataset, identity["teacher"], processes)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "window_steps": {}, "metrics": {}, "best": None}
    if checkpoint.exists(last):
        tensors, state = checkpoint.load(last)
        check_identity(state["identity"], identity, last)
        load_whole(network, tensors["model"])
        ema.load({name: tensors["model_ema"][name] for name in parameters}, state["ema"])
        checkpoint.load_optimizer(optimizer, tensors["optimizer"], state["optimizer"])
        with torch.no_grad():
            for name, parameter in heads.items():
                parameter.copy_(laid_out_as(parameter, tensors["aux"][name]))
        if discriminator is not None:
            discriminator.load_state_dict(tensors["model_gan"])
            checkpoint.load_optimizer(gan_optimizer, tensors["optimizer_gan"], state["optimizer_gan"])
        windows = tensors["aux"]["windows"]
        window.copy_(windows[rank] if len(windows) == world else windows.mean(0))
    start = state["step"]
    if training.grad_checkpoint:
        recompute_activations(network)
    if cfg.ssdd.compile:
        network.compile()
        if cfg.distill_teacher:
            objective.teacher.compile()
    model = objective if training.fsdp else processes.data_parallel(objective)
    if discriminator is not None:
        adversary = processes.data_parallel(discriminator)
        discriminator.requires_grad_(False).eval()  # but in its own step
    scaler = precision.loss_scaler()
    if scaler.is_enabled() and "scaler" in state:
        scaler.load_state_dict(state["scaler"])
    if processes.is_main:
        directory.save_config(cfg)
        directory.truncate_metrics(start)

    def save(names: list[str]) -> None:
        windows = processes.gather(window.unsqueeze(0))  # [world, terms + 1]
        optimizer_tensors, optimizer_values = checkpoint.optimizer_tensors(optimizer)
        groups = {
            "model": network.state_dict(),
            "model_ema": network.state_dict() | ema.tensors(),
            "optimizer": optimizer_tensors,
            "aux": {"windows": windows, **heads},
        }
        state.update(identity=identity, ema=ema.state(), optimizer=optimizer_values)
        if discriminator is not None:
            groups["model_gan"] = discriminator.state_dict()
            groups["optimizer_gan"], state["optimizer_gan"] = checkpoint.optimizer_tensors(gan_optimizer)
        if scaler.is_enabled():
            state["scaler"] = scaler.state_dict()
        groups = {name: gathered(group, keep=processes.is_main) for name, group in groups.items()}
        if not processes.is_main:
            return
        checkpoint.save(directory.checkpoints / names[0], groups, state, network.metadata)
        for name in names[1:]:
            checkpoint.link(directory.checkpoints / names[0], directory.checkpoints / name)
        if training.keep:
            checkpoint.keep_newest(directory.checkpoints, training.keep)

    def discriminator_backward(part: slice) -> torch.Tensor:
        """Gradients of the discriminator's loss on the images of the last forward pass; the loss, detached."""
        prediction, x_t, t = objective.images.seen
        discriminator.requires_grad_(True)
        with gradients_kept(adversary, part.stop < rows):
            with precision.autocast():
                loss = adversary(x[part], prediction, x_t, t)
            (cfg.losses.gan_train * loss / training.grad_accumulate).backward()  # fp16 is refused: nothing to scale
        discriminator.requires_grad_(False)
        return loss.detach()

    z_shape = (network.z_dim, cfg.dataset.im_size // network.f, cfg.dataset.im_size // network.f)
    time_args = cfg.ssdd.fm_trainer.t_sampler_args
    batches = train_batches(dataset, batch_size, cfg.seed, start, rank, world, cfg.dataset.reading_processes)
    began = time.perf_counter() - state["seconds"]
    throughput = Throughput(device, precision.name, batch_size, flop, world, start)
    progress = ProgressLog(
        steps,
        description=f"{'distil' if cfg.distill_teacher else 'train'} {cfg.run_name}",
        run=directory,
        start=start,
        main_process=processes.is_main,
        wandb=training.wandb,
    )
    with StopRequest() as stop, progress:
        progress.message(precision.headline(state))
        state["precision"] = precision.name
        for step in range(start, steps):
            # Data and draws of this step.
            x, _, indices, epoch = throughput.next(batches)
            x = x.to(device, non_blocking=True, memory_format=torch.channels_last)  # [b, 3, H, W]
            shapes = (batch_size, *x.shape[1:]), (batch_size, *z_shape)
            draws = step_draws(cfg.seed, step, *shapes, device, time_args.t_mean, time_args.t_std)
            draws = draws.rows(slice(rank * rows, (rank + 1) * rows))
            if stored:
                draws.eps = targets.noise(indices, epoch, tuple(x.shape[1:])).to(device)
                z, images = (tensor.to(device) for tensor in targets.gather(indices, epoch))
            lr = learning_rate(training.lr, step, steps, training.warmup_steps, training.lr_schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            active = active_terms(cfg, objective.terms, step)
            adversarial = "gan_disc" in active
            if adversarial:
                discriminator.update_norms()

            # Accumulate gradients; processes exchange them in the last part only, sharded ones in each.
            size = rows // training.grad_accumulate
            finite = torch.ones((), dtype=torch.bool, device=device)
            for part in (slice(first, first + size) for first in range(0, rows, size)):
                with gradients_kept(model, part.stop < rows):
                    with precision.autocast():
                        given = [(z[part], images[part])] if stored else []
                        terms = model(x[part], draws.rows(part), active, *given)
                    loss = weighted_sum(terms, vars(cfg.losses)) / training.grad_accumulate
                    scaler.scale(loss).backward()
                finite &= loss.isfinite()
                if adversarial:
                    terms["gan_train"] = discriminator_backward(part)
                    finite &= terms["gan_train"].isfinite()
                for i, name in enumerate(logged[:-1]):
                    if name in terms:
                        window[i] += terms[name].detach() / training.grad_accumulate

            # Optimise, average.
            largest = training.grad_clip or math.inf
            scaler.unscale_(optimizer)
            norms = [whole(clip_grad_norm_(parameters.values(), largest))]
            norms += [whole(clip_grad_norm_(heads.values(), largest))] if heads else []
            norms += [clip_grad_norm_(discriminator.parameters(), largest)] if adversarial else []
            window[-1] += norms[0]
            finite &= torch.stack(norms).isfinite().all() | scaler.is_enabled()  # a scaler skips such steps
            bad_step = torch.where((bad_step < 0) & ~finite, step + 1, bad_step)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if adversarial:
                for group in gan_optimizer.param_groups:
                    group["lr"] = lr
                gan_optimizer.step()
                gan_optimizer.zero_grad(set_to_none=True)
            ema.update(averaged_weights(optimizer, parameters))
            done = step + 1
            counted = [*active, "grad_norm", *["gan_train"] * adversarial]
            state["window_steps"] = {name: state["window_steps"].get(name, 0) + (name in counted) for name in logged}
            state["step"] = done
            progress.advance()

            # Log: the only place besides checkpoints and evaluations that waits for the device.
            stopping = stop.agreed()
            ended = done == steps
            whole_epochs = done // epoch_steps if done % epoch_steps == 0 else None
            due = whole_epochs is not None and whole_epochs % training.eval_freq == 0 if evaluation else False
            evaluating = evaluation is not None and (ended or due)
            logging = done == 1 or done % training.log_freq == 0 or ended
            names: list[str] = []  # of checkpoints beside `last`
            saving = stopping or ended or done % training.save_every == 0 or evaluating
            if logging or saving:
                check_finite(processes, bad_step, last)
            if logging:
                sums, counts = processes.mean(window).tolist(), state["window_steps"]
                sums = dict(zip(logged, sums, strict=True))
                state["metrics"] = {name: sums[name] / count for name, count in counts.items() if count}
                values = {**state["metrics"], "lr": lr, "images": done * batch_size}
                progress.metrics(done, values | throughput.line(done))
                window.zero_()
                state["window_steps"] = {}

            # Look at the averaged weights; the best ones are kept.
            drawing = picture is not None and picture_due(training.sample_every, done, evaluating)
            if evaluating or drawing:
                shown.load_state_dict(gathered(network.state_dict() | ema.tensors()))
            if drawing and processes.is_main:
                with throughput.paused():
                    progress.picture(done, "reconstructions", picture.draw(shown))
            if evaluating:
                row = Row("tokenizer", shown, network.config["fm_sampler"]["steps"])
                with throughput.paused():
                    scores = evaluation.run([row])["rows"][0]
                metric, value = evaluation.deciding(scores, training.save_on_best)
                progress.metrics(done, {f"val/{name}": v for name, v in scores.items() if isinstance(v, float)})
                best = state["best"]
                better = best is None or best["metric"] != metric or value > best["value"]
                if processes.agree(lambda better=better: better):  # one answer for all, to the last bit
                    state["best"] = {"metric": metric, "value": value, "step": done}
                    names.append("best")

            # Checkpoint; `last` comes last, for a resumed run does again what comes after it.
            if training.keep and done % training.save_every == 0:
                names.append(checkpoint.step_name(done))
            if saving:
                state["seconds"] = time.perf_counter() - began
                with throughput.paused():
                    save([*names, "last"])
                    processes.wait()
            if stopping and not ended:
                progress.message(f"stopped by a signal after step {done}; the same command continues from {last}")
                raise SystemExit(0)

    result = {
        "task": "train",
        "steps": steps,
        "images": steps * batch_size,
        **state["metrics"],
        "best": state["best"],
        "parameters": sum(p.numel() for p in parameters.values()),
        "tokenizer": network.config,
        "precision": precision.record(),
        "checkpoint": str(last),
        "seconds": state["seconds"],
        "images_per_s": steps * batch_size / max(state["seconds"], 1e-9),
        "peak_memory_bytes": peak_memory(device),
    }
    if processes.is_main and not (start == steps and directory.result.exists()):
        directory.write_result(result)
    processes.wait()
    return result


def _check(cfg: SSDDConfig, steps: int) -> None:
    """UserError for numbers that no run can work with."""
    training = cfg.training
    least = {"log_freq": training.log_freq, "save_every": training.save_every}
    least |= {"epochs": training.epochs} if training.steps is None else {"steps": steps}
    least = {f"training.{key}": value for key, value in least.items()}
    for key, value in (least | {"ssdd.fm_sampler.steps": cfg.ssdd.fm_sampler.steps}).items():
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    if training.grad_clip < 0:
        raise UserError(f"training.grad_clip={training.grad_clip} must not be negative; 0 switches clipping off")
    if training.fsdp and cfg.ssdd.compile:
        raise UserError("training.fsdp=true does not go with compiled networks yet: set ssdd.compile=false")


def active_terms(cfg: SSDDConfig, terms: list[str], step: int) -> list[str]:
    """The loss terms that have started at a step."""
    starts = {**vars(cfg.losses_start), "gan_disc": cfg.gan.start_iter}
    return [name for name in terms if step >= starts.get(name, 0)]
