"""Task `sample`: draw latents once, so that any number of decoders can decode the same ones.

Sample i depends on the weights, the settings and i alone. Samples are drawn in chunks fixed by index (the last one is
filled up with samples that are then dropped), so a set is the same bytes on any number of processes, and a smaller set
is the beginning of a larger one. Result: `latents.safetensors` (z_n float32 [n, C, h, w] as the generator sees them,
labels int64 [n]), `z_stats.json` (to denormalise them) and `sample_set.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor

from dit.config import DiTConfig, SamplingConfig
from dit.guidance import guided_velocity
from dit.interop import load_dit
from dit.model import DiT
from ssdd.engine.checkpoint import load_tensors, resolve, save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, sha256_file, sha256_json, write_json
from ssdd.engine.noise import batch_generator, indexed_noise
from ssdd.engine.precision import mixed_precision
from ssdd.flow import euler, time_grid


def sample_labels(indices: Iterable[int], num_classes: int, seed: int, balanced: bool = True) -> Tensor:
    """Class of each sample index, int64 [n]: index modulo classes, or drawn at random from (seed, index)."""
    if balanced:
        return torch.tensor([i % num_classes for i in indices], dtype=torch.int64)
    draws = [torch.randint(num_classes, (), generator=batch_generator("cpu", seed, "label", i)) for i in indices]
    return torch.stack(draws) if draws else torch.empty(0, dtype=torch.int64)


@torch.inference_mode()
def draw(model: DiT, indices: Iterable[int], labels: Tensor, cfg: SamplingConfig) -> Tensor:
    """Normalised latents z_n of the given sample indices and labels [n]: float32 [n, C, h, w] on the CPU.

    Uses `cfg`'s seed, steps, shift and guidance; the model is used as it is (device, eval mode, autocast around).
    """
    device = model.pos_embed.device
    shape = (model.in_channels, *model.config["input_size"])
    noise = indexed_noise(list(indices), shape, cfg.seed, stream="dit.sample").to(device)
    velocity = guided_velocity(
        model, labels.to(device), cfg.cfg_scale, cfg_channels=cfg.cfg_channels, interval=tuple(cfg.cfg_interval)
    )
    return euler(velocity, noise, time_grid(cfg.steps, power=1.0, shift=cfg.shift)).cpu()


def run(cfg: DiTConfig) -> Path:
    """Draw `sampling.n` latents into `out`, which is returned; continues an interrupted set, keeps a finished one."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    sampling = cfg.sampling
    if sampling.n < 1 or sampling.batch_size < 1 or sampling.steps < 1:
        raise UserError("sampling.n, sampling.batch_size and sampling.steps must be at least 1.")
    reference = sampling.checkpoint or cfg.run_name
    weights = resolve(reference, cfg.ckpt_dir)
    model = load_dit(weights, sampling.family).to(state.device)
    out = Path(cfg.out) if cfg.out else Path(cfg.ckpt_dir) / "jobs" / cfg.run_name / "samples"
    chunk_size = min(sampling.batch_size, sampling.n)
    precision = mixed_precision(sampling.mixed_precision, state.device)
    request = {
        "weights": sha256_file(weights),
        "convention": model.config["convention"],
        "seed": sampling.seed,
        "balanced": sampling.balanced,
        "steps": sampling.steps,
        "shift": sampling.shift,
        "cfg_scale": sampling.cfg_scale,
        "cfg_channels": sampling.cfg_channels,
        "cfg_interval": list(sampling.cfg_interval),
        "chunk_size": chunk_size,
        "mixed_precision": precision,
    }
    if _finished(out, request, sampling.n):
        state.print(f"{out} already holds these {sampling.n} samples")
        return out

    chunks = out / "chunks"
    if state.is_main_process:
        _prepare(chunks, request)
    state.wait_for_everyone()
    starts = range(0, sampling.n, chunk_size)
    for start in starts[state.process_index :: state.num_processes]:
        file = chunks / f"{start:09d}.safetensors"
        if file.exists():
            continue
        indices = range(start, start + chunk_size)
        labels = sample_labels(indices, model.num_classes, sampling.seed, sampling.balanced)
        with torch.autocast(state.device.type, _DTYPES.get(precision), enabled=precision in _DTYPES):
            z_n = draw(model, indices, labels, sampling)
        if not torch.isfinite(z_n).all():
            raise UserError(f"samples {start} to {start + chunk_size - 1} of {weights} are not finite; was it trained?")
        save_tensors(file, {"z_n": z_n, "labels": labels})
        state.print(f"sampled {min(start + chunk_size * state.num_processes, sampling.n)} of {sampling.n}")
    state.wait_for_everyone()
    if state.is_main_process:
        _merge(out, chunks, starts, sampling.n)
        _describe(out, request, model, weights, reference, sampling.n)
        shutil.rmtree(chunks)
    state.wait_for_everyone()
    return out


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _finished(out: Path, request: dict, n: int) -> bool:
    described = out / "sample_set.json"
    if not described.exists():
        return False
    found = read_json(described)
    return found["n"] == n and found["request"] == sha256_json(request) and (out / "latents.safetensors").exists()


def _prepare(chunks: Path, request: dict) -> None:
    """Keep chunks of the same request, whatever their number; drop those of another one."""
    if chunks.exists() and (not (chunks / "request.json").exists() or read_json(chunks / "request.json") != request):
        shutil.rmtree(chunks)
    (chunks.parent / "sample_set.json").unlink(
        missing_ok=True
    )  # written last: while it is absent, the set is unfinished
    write_json(chunks / "request.json", request)


def _merge(out: Path, chunks: Path, starts: range, n: int) -> None:
    parts = [load_tensors(chunks / f"{start:09d}.safetensors") for start in starts]
    merged = {key: torch.cat([part[key] for part in parts])[:n].contiguous() for key in ("z_n", "labels")}
    save_tensors(out / "latents.safetensors", merged)


def _describe(out: Path, request: dict, model: DiT, weights: Path, reference: str, n: int) -> None:
    trained_on = {}
    if weights.suffix == ".safetensors":  # other people's torch files record nothing of the kind
        with safe_open(weights, framework="pt") as handle:
            trained_on = json.loads((handle.metadata() or {}).get("trained_on", "{}"))
    if "z_stats" in trained_on:
        write_json(out / "z_stats.json", trained_on["z_stats"])
    description = {
        "n": n,
        **request,
        "request": sha256_json(request),
        "checkpoint": reference,
        "model": model.config,
        "latent_shape": [model.in_channels, *model.config["input_size"]],
        "num_classes": model.num_classes,
        "class_names": trained_on.get("class_names"),
        "z_stats": "z_stats.json" if "z_stats" in trained_on else None,
        "latents_sha256": sha256_file(out / "latents.safetensors"),
    }
    write_json(out / "sample_set.json", description)
