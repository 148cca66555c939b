"""Task `sample`: draw latents once, so that any number of decoders can decode the same ones.

Sample i depends on the weights, the settings and i alone. Samples are drawn in chunks fixed by index (the last one is
filled up with samples that are then dropped), so a set is the same bytes on any number of processes, and a smaller set
is the beginning of a larger one, on machines of one kind (docs/reliability.md). Result: `latents.safetensors` (z_n
float32 [n, C, h, w] as the generator sees them, labels int64 [n]), `z_stats.json` (to denormalise them), `speed.json`
and `sample_set.json`.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dit.config import DiTConfig, SamplingConfig
from dit.foreign_checkpoints import load_dit
from dit.guidance import guided_velocity, split_by_interval
from dit.model import DiT
from dit.samplers import SAMPLERS
from ssdd.engine.checkpoint import resolve, save_tensors
from ssdd.engine.devices import choose_kernels, to_device
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file, sha256_json, write_json
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.random import batch_generator, indexed_noise
from ssdd.engine.resumable import Chunks, WorkRecord


def sample_labels(indices: Iterable[int], num_classes: int, seed: int, balanced: bool = True) -> Tensor:
    """Class of each sample index, int64 [n]: index modulo classes, or drawn at random from (seed, index)."""
    if balanced:
        return torch.tensor([i % num_classes for i in indices], dtype=torch.int64)
    draws = [torch.randint(num_classes, (), generator=batch_generator("cpu", seed, "label", i)) for i in indices]
    return torch.stack(draws) if draws else torch.empty(0, dtype=torch.int64)


@torch.inference_mode()
def draw(model: DiT, indices: Iterable[int], labels: Tensor, cfg: SamplingConfig, guide: DiT | None = None) -> Tensor:
    """Normalised latents z_n of the given sample indices and labels [n]: float32 [n, C, h, w] on the CPU.

    Uses `cfg`'s seed, sampler and guidance; the models are used as they are (device, eval mode, autocast around). All
    noise is that of (seed, step, index). The host waits for the device once, at the end (sampler=adaptive: every step).
    """
    indices, shape, device = list(indices), latent_shape(model), next(model.parameters()).device
    labels = labels.to(device)
    plain = guided_velocity(model, labels)
    guided = guided_velocity(
        model, labels, cfg.cfg_scale, cfg_channels=cfg.cfg_channels, guide=guide, guide_scale=cfg.guide_scale
    )
    sampler = SAMPLERS[cfg.sampler]
    noise = (_noise(indices, shape, cfg.seed, f"dit.{cfg.sampler}.{i}", device) for i in itertools.count())
    solve = sampler.solver(cfg, noise)
    x = _noise(indices, shape, cfg.seed, "dit.sample", device)
    for inside, piece in split_by_interval(sampler.grid(cfg), tuple(cfg.cfg_interval)):
        x = solve(guided if inside else plain, x, piece)
    return x.cpu()


def latent_shape(model: DiT) -> tuple[int, int, int]:
    """(C, h, w) of the latents that a model was built for."""
    return model.in_channels, *model.options.input_size


def _noise(indices: list[int], shape: Sequence[int], seed: int, stream: str, device: torch.device) -> Tensor:
    """indexed_noise on the device."""
    return to_device(indexed_noise(indices, shape, seed, stream), device)


def run(cfg: DiTConfig) -> Path:
    """Draw `sampling.n` latents into `out`, which is returned; continues an interrupted set, keeps a finished one."""
    processes, sampling = Processes.join(), cfg.sampling
    check_sampling(sampling)
    precision = Precision.resolve(sampling.mixed_precision, processes.device, measuring=True)
    choose_kernels(tf32=False)
    reference = sampling.checkpoint or cfg.run_name
    weights = averaged(resolve(reference, cfg.ckpt_dir), sampling.ema)
    model = load_dit(weights, sampling.family).to(processes.device)
    guide_weights = resolve(sampling.guide, cfg.ckpt_dir) if sampling.guide else None
    guide = None if guide_weights is None else load_guide(guide_weights, weights, model, sampling.family)
    out = Path(cfg.out) if cfg.out else Path(cfg.ckpt_dir) / "jobs" / cfg.run_name / "samples"
    chunk_size = min(sampling.batch_size, sampling.n)
    request = {
        **{key: value for key, value in asdict(sampling).items() if key not in ("checkpoint", "n", "batch_size")},
        "weights": sha256_file(weights),
        "convention": model.options.convention,
        "guide": guide_weights and sha256_file(guide_weights),
        "cfg_interval": list(sampling.cfg_interval),
        "chunk_size": chunk_size,
        "mixed_precision": precision.name,
    }
    if _finished(out, request, sampling.n):
        processes.print(f"{out} already holds these {sampling.n} samples")
        return out

    chunks = Chunks(out / "chunks", request, sampling.n, chunk_size)
    if processes.is_main:
        # Written last: while it is absent, the set is unfinished.
        (out / "sample_set.json").unlink(missing_ok=True)
        chunks.prepare()
    processes.wait()
    if sampling.compile:
        for network in filter(None, (model, guide)):
            network.compile(dynamic=False)
    for missing in chunks.missing(processes.rank, processes.world):
        indices = range(missing.start, missing.start + chunk_size)
        labels = sample_labels(indices, model.num_classes, sampling.seed, sampling.balanced)
        began = time.perf_counter()
        with precision.autocast():
            z_n = draw(model, indices, labels, sampling, guide)
        seconds = (time.perf_counter() - began) * len(missing) / chunk_size
        if not torch.isfinite(z_n).all():
            raise UserError(f"samples {indices.start} to {indices[-1]} of {weights} are not finite: is it trained?")
        chunks.save(missing, {"z_n": z_n, "labels": labels}, seconds)
        processes.print(f"sampled {min(missing.start + chunk_size * processes.world, sampling.n)} of {sampling.n}")
    processes.wait()
    if processes.is_main:
        parts = [chunks.load(indices) for indices in chunks.ranges]
        merged = {key: torch.cat([part[key] for part in parts])[: sampling.n] for key in ("z_n", "labels")}
        save_tensors(out / "latents.safetensors", merged)
        speed = {"samples_per_s": chunks.samples_per_s() * processes.world, "processes": processes.world}
        write_json(out / "speed.json", speed | {"device": str(processes.device)})
        _describe(out, request, precision, model, weights, reference, sampling.n)
        chunks.remove()
    processes.wait()
    return out


def averaged(weights: Path, decay: float | None) -> Path:
    """The file of the average of this decay beside `weights`, a run's first average; UserError if there is none."""
    if decay is None:
        return weights
    file = weights.with_name(f"model_ema_{decay:g}.safetensors")
    if not file.is_file():
        there = ", ".join(sorted(path.name for path in weights.parent.glob("model_ema*"))) or "none"
        raise UserError(
            f"sampling.ema={decay:g}: there is no {file}, only {there}; the first of training.ema.decays is "
            "model_ema, which needs no sampling.ema"
        )
    return file


def load_guide(weights: Path, main_weights: Path, model: DiT, family: str | None = None) -> DiT:
    """The weaker model of autoguidance, on the device of `model`; UserError unless both draw the same latents."""
    guide = load_dit(weights, family)
    shapes, classes = [latent_shape(guide), latent_shape(model)], [guide.num_classes, model.num_classes]
    statistics = [trained_on(file).get("z_stats") for file in (weights, main_weights)]
    for difference, found in {
        f"latents of {shapes[0]}, not {shapes[1]}": shapes[0] != shapes[1],
        f"{classes[0]} classes, not {classes[1]}": classes[0] != classes[1],
        "latents with other statistics (z_stats)": None not in statistics and statistics[0] != statistics[1],
    }.items():
        if found:
            raise UserError(
                f"sampling.guide={weights} was trained on {difference}; a guide of {main_weights} is a weaker model of "
                "the same cache"
            )
    return guide.to(next(model.parameters()).device)


def check_sampling(cfg: SamplingConfig) -> None:
    """UserError for numbers that no sampler can work with."""
    if cfg.n < 1 or cfg.batch_size < 1 or cfg.steps < 1:
        raise UserError("sampling.n, sampling.batch_size and sampling.steps must be at least 1")
    if cfg.shift <= 0 or cfg.rtol < 0 or cfg.atol < 0 or cfg.rtol + cfg.atol == 0:
        raise UserError("sampling.shift, and sampling.rtol or sampling.atol, must be positive")
    if cfg.sde_scale < 0 or not 0 < cfg.sde_last_step < 1:
        raise UserError("sampling.sde_scale must not be negative, and sampling.sde_last_step lies between 0 and 1")
    if cfg.guide and cfg.guide_scale == 1:
        raise UserError(f"sampling.guide={cfg.guide} has no effect at sampling.guide_scale=1; 2 is a usual scale")
    split_by_interval([1.0, 0.0], tuple(cfg.cfg_interval))


def _finished(out: Path, request: dict, n: int) -> bool:
    described = WorkRecord(out / "sample_set.json", {"n": n, "request": sha256_json(request)})
    return described.read() is not None and (out / "latents.safetensors").exists()


def trained_on(weights: Path) -> dict:
    """What the trainer recorded about the cache in a weights file; foreign torch files record nothing."""
    if weights.suffix != ".safetensors":
        return {}
    with safe_open(weights, framework="pt") as handle:
        return json.loads((handle.metadata() or {}).get("trained_on", "{}"))


def _describe(
    out: Path, request: dict, precision: Precision, model: DiT, weights: Path, reference: str, n: int
) -> None:
    recorded = trained_on(weights)
    if "z_stats" in recorded:
        write_json(out / "z_stats.json", recorded["z_stats"])
    description = {
        "n": n,
        **request,
        "request": sha256_json(request),
        "precision": precision.record(),
        "checkpoint": reference,
        "model": model.config,
        "latent_shape": list(latent_shape(model)),
        "num_classes": model.num_classes,
        "class_names": recorded.get("class_names"),
        "z_stats": "z_stats.json" if "z_stats" in recorded else None,
        "images": recorded.get("images"),
        "latents_sha256": sha256_file(out / "latents.safetensors"),
    }
    write_json(out / "sample_set.json", description)
