"""Task `train`: train or distil the tokenizer, one straight page from the first step to the last.

Every random draw of a step comes from one generator seeded by (seed, step) for the whole global batch, of which each
process keeps its rows: a run does not depend on the number of processes, and a resumed run draws what it would have
drawn. Averaged weights are computed separately from the trained ones: no byte depends on when they are evaluated. Equal
bytes are promised for one kind of machine, number of threads and precision (docs/reliability.md).
"""

from __future__ import annotations

from typing import Any

import torch

from ssdd.config import SSDDConfig
from ssdd.engine import checkpoint
from ssdd.engine.devices import choose_kernels, peak_memory
from ssdd.engine.ema import AVERAGE, build_averages, update_averages
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file
from ssdd.engine.interrupt import StopRequest
from ssdd.engine.optim import GradientStep, averaged_weights, build_optimizer, learning_rate, parameter_groups
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes, gradients_kept
from ssdd.engine.random import seed_of
from ssdd.engine.recompute import recompute_activations
from ssdd.engine.run import RunDirectory
from ssdd.engine.running_means import RunningMeans
from ssdd.engine.sharding import shard, sharded_blocks
from ssdd.engine.state import Auxiliary, Average, OptimizerState, TrainingState, Weights
from ssdd.engine.throughput import Throughput
from ssdd.engine.training_checks import FirstBadStep, check_training
from ssdd.losses.objective import weighted_sum
from ssdd.losses.repa import trained_heads
from ssdd.model.tokenizer import SSDD
from ssdd.tasks.adversary_training import AdversaryTraining
from ssdd.tasks.build import build_discriminator, build_objective, build_tokenizer, flop_per_image
from ssdd.tasks.dry_run import dry_run
from ssdd.tasks.reconstruction_monitor import ReconstructionMonitor
from ssdd.tasks.training_images import TrainingImages


def run(cfg: SSDDConfig) -> dict[str, Any]:
    """Train, or continue, the run `cfg.run_name`; returns what it writes to task_result.json, or what a dry run found.

    Exits with status 0 after a checkpoint when SIGTERM or SIGUSR1 arrives. UserError before the first step when data,
    weights, batch size or an earlier checkpoint of the same run do not fit together.
    """
    training, processes = cfg.training, Processes.join()
    device, world = processes.device, processes.world
    precision = Precision.resolve(training.mixed_precision, device)
    choose_kernels(cfg.deterministic)
    check(cfg)
    directory, images = RunDirectory(cfg.ckpt_dir, cfg.run_name), TrainingImages(cfg, processes)
    steps, identity = images.steps, identity_of(cfg, images)
    if result := processes.agree(lambda: directory.finished(cfg, identity)):
        return result

    # Networks, and what trains them.
    torch.manual_seed(seed_of(cfg.seed, "ssdd.init"))
    network, discriminator = build_tokenizer(cfg).to(device), build_discriminator(cfg, precision)
    objective = build_objective(cfg, network, discriminator).to(device)
    flop = flop_per_image(cfg, objective, precision)
    monitor = ReconstructionMonitor(cfg, network, processes, precision)
    if training.fsdp:
        shard(objective, sharded_blocks(network), device, world)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    heads = trained_heads(getattr(objective, "repa", None))
    groups = parameter_groups(parameters | heads, objective, training.weight_decay)
    optimizer = build_optimizer(training.optimizer, groups, training.lr, training.betas)
    scaler = precision.loss_scaler()
    update = GradientStep(optimizer, [*parameters.values(), *heads.values()], training.grad_clip, scaler)
    adversary = AdversaryTraining(cfg, discriminator, precision)
    averages = build_averages(training.ema, parameters, steps)
    means = RunningMeans([*objective.terms, *adversary.terms, "grad_norm"], device)
    bad = FirstBadStep(device)
    identity |= identity_of_networks(cfg, network, objective.terms, list(averages))
    images.store_targets(objective, [identity.get("teacher"), identity.get("teacher_encoder")])
    if training.grad_checkpoint:
        recompute_activations(network)
    if training.compile:
        for compiled in filter(None, (network, getattr(objective, "teacher", None))):
            compiled.compile()
    model = objective if training.fsdp else processes.data_parallel(objective)
    adversary.distribute(processes)
    if cfg.dry_run:
        return dry_run(cfg, images, model, update, adversary, averages)

    # Resume: the state has all that a step reads, besides the config.
    parts = {
        "model": Weights(network),
        **{name: Average(average, network) for name, average in averages.items()},
        "optimizer": OptimizerState(optimizer),
        "aux": Auxiliary(heads, means, scaler, processes),
        **adversary.parts,
    }
    state = TrainingState(directory, processes, identity, parts, network.metadata, precision, training.keep)
    state.restore(steps)
    if state.step == steps and (result := processes.agree(directory.training_result)):
        return result
    if processes.is_main:
        directory.begin(cfg, state.step)
    batches = images.read(state.step)
    throughput = Throughput(device, precision.name, images.batch_size, flop, world, state.step)
    title = f"{'distil' if cfg.distill_teacher else 'train'} {cfg.run_name}"
    with StopRequest() as stop, state.log(steps, title, training.wandb) as progress:
        progress.message(state.headline())
        for step in range(state.step, steps):
            # Data and draws of this step.
            batch = images.batch(throughput.next(batches), step, network)
            lr = learning_rate(training.lr, step, steps, training.warmup_steps, training.lr_schedule)
            active = active_terms(cfg, objective.terms, step)
            adversary.begin("gan_disc" in active)

            # Accumulate gradients; processes exchange them in the last part only, sharded ones in each.
            for part in images.parts:
                more = part.stop < images.rows
                x, draws, stored = batch.rows(part)
                with gradients_kept(model, more):
                    with precision.autocast():
                        terms, predicted = model(x, draws, active, *stored)
                    loss = weighted_sum(terms, vars(cfg.losses)) / training.grad_accumulate
                    update.backward(loss)
                terms |= adversary.backward(x, predicted, more)
                means.add(terms, 1 / training.grad_accumulate)
                bad.add(loss, terms.get("gan_train"))

            # Optimise, average.
            norm, adversary_norm = update.apply(lr), adversary.apply(lr)
            bad.add(adversary_norm, None if scaler.is_enabled() else norm)  # a scaler skips such steps
            update_averages(averages, averaged_weights(optimizer, parameters))
            state.step = done = step + 1
            means.add({"grad_norm": norm})
            means.count([*active, *(adversary.terms if adversary.active else ()), "grad_norm"])
            bad.end(done)
            progress.advance()

            # Log: the only place besides evaluations and checkpoints that waits for the device.
            stopping, ended = stop.agreed(), done == steps
            evaluating = monitor.evaluates(done, images.epoch_steps, ended)
            logging = done == 1 or done % training.log_freq == 0 or ended
            saving = stopping or ended or done % training.save_every == 0 or evaluating
            if logging or saving:
                bad.check(processes, directory.last)
            if logging:
                state.metrics = means.read(processes)
                counts = {"lr": lr, "images": done * images.batch_size}
                progress.metrics(done, state.metrics | counts | throughput.line(done))

            # Evaluate what the averaged weights make, and draw it; the best ones are kept.
            names: list[str] = []
            if monitor.due(done, evaluating):
                with throughput.paused():
                    names += monitor.take(evaluating, averages[AVERAGE].tensors(), state, progress)

            # Checkpoint; `last` comes last, for a resumed run does again what comes after it.
            if saving:
                if training.keep and done % training.save_every == 0:
                    names.append(checkpoint.step_name(done))
                with throughput.paused():
                    state.save(*names, "last")
            if stopping and not ended:
                progress.message(f"stopped by a signal after step {done}; the same command continues")
                raise SystemExit(0)

    result = {"task": "train", "best": state.best, **state.result(steps, images.batch_size, parameters.values())}
    result |= {"tokenizer": network.config, "peak_memory_bytes": peak_memory(device)}
    if processes.is_main:
        directory.write_result(result)
    processes.wait()
    return result


def check(cfg: SSDDConfig) -> None:
    """UserError for numbers that no run can work with."""
    training = cfg.training
    check_training(training, {"epochs": training.epochs} if training.steps is None else {"steps": training.steps})
    if cfg.ssdd.fm_sampler.steps < 1:
        raise UserError(f"ssdd.fm_sampler.steps={cfg.ssdd.fm_sampler.steps} must be at least 1")


def identity_of(cfg: SSDDConfig, images: TrainingImages) -> dict[str, Any]:
    """What must not change while a run goes on, as far as it is known before the networks are built."""
    identity = {"data": images.dataset.source.fingerprint(), "batch_size": images.batch_size, "seed": cfg.seed}
    identity |= {"optimizer": cfg.training.optimizer, "objective": cfg.objective, "teacher": None}
    if cfg.distill_teacher and cfg.ssdd.checkpoint is not None:
        teacher = sha256_file(checkpoint.resolve(cfg.ssdd.checkpoint, cfg.ckpt_dir))
        identity |= {"teacher": teacher, "sampler": vars(cfg.ssdd.fm_sampler), "distill": vars(cfg.distill)}
    return identity


def identity_of_networks(cfg: SSDDConfig, network: SSDD, terms: list[str], averages: list[str]) -> dict[str, Any]:
    """The rest of it; terms: names of the losses; averages: files of the moving averages."""
    identity = {"encoder": network.config["encoder"], "decoder": network.config["decoder"], "terms": terms}
    identity["averages"] = averages if len(averages) > 1 else None  # runs from before there were several record none
    return identity | ({"teacher_encoder": network.encoder_fingerprint()} if cfg.distill_teacher else {})


def active_terms(cfg: SSDDConfig, terms: list[str], step: int) -> list[str]:
    """The loss terms that have started at a step."""
    starts = {**vars(cfg.losses_start), "gan_disc": cfg.gan.start_iter}
    return [name for name in terms if step >= starts.get(name, 0)]
