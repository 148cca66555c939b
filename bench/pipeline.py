"""Sampling from class to image: `python scripts/bench.py pipeline key=value`.

Our chain draws f16c4 latents and decodes them in one step; the usual one draws f8c4 latents, four times as many, with a
DiT of the same name and decodes them with AutoencoderKL. All weights are random: this is speed alone, not at equal
quality.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.networks import OURS, build, compile_network, decoding, fill_zeros, parameter_count
from bench.processes import Work, measure_in_turn
from bench.report import GFLOP, LAYOUT, MEMORY, NETWORK, PARAMETERS, RATE, SECONDS, Report, bench_device, rates, ratio
from bench.settings import DTYPES, Rounds, check_positive, form
from dit.config import SamplingConfig
from dit.model import DiT
from dit.options import NAMES
from dit.samplers import SAMPLERS
from dit.tasks.sample import draw, sample_labels
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.tables import Column
from ssdd.engine.throughput import count_forward_flop
from ssdd.model.decoder_families import decoder_names

PEER = "AutoencoderKL"
ENCODER, STRIDE = "f16c4", 16
CLASSES = 1000
COLUMNS = (
    NETWORK,
    LAYOUT,
    PARAMETERS,
    GFLOP,
    Column("DiT s", "sample_seconds", 9, 4),
    Column("decode s", "decode_seconds", 9, 4),
    RATE,
    *SECONDS,
    MEMORY,
    Column("ratio", "ratio", 7, 3),
)


@dataclass
class PipelineSettings(Rounds):
    """Images per second with f16c4 latents and our one-step decoder, and with f8c4 latents and AutoencoderKL. Speed
    alone: weights are random, and quality is not measured."""

    model: str | None = field(default=None, metadata={"choices": NAMES})
    """DiT of both chains; null is DiT-XL/2 on CUDA and DiT-S/2 on a CPU."""
    decoder: str = field(default="M", metadata={"choices": decoder_names})
    """Our decoder's size."""
    side: int = 256
    """Pixels of the image's sides."""
    batch: int = 4
    """Images per batch."""
    steps: int = 50
    """Euler steps of the DiT."""
    cfg_scale: float = 1.5
    """Scale of classifier-free guidance; 1 disables it and halves the work."""
    dtype: str = field(default="float32", metadata={"choices": tuple(DTYPES)})
    """bfloat16: autocast of the DiT, as dit/main.py samples, and decoder weights of that type."""
    compile: bool = False
    """torch.compile all networks."""


def pipeline(argv: list[str]) -> int:
    """A table of both chains and their parts, and the same as one line of JSON."""
    settings = parse(PipelineSettings, argv, program="bench pipeline", description=__doc__)
    check_positive(settings, "side", "batch", "steps", "rounds")
    model = settings.model or ("DiT-XL/2" if bench_device().type == "cuda" else "DiT-S/2")
    settings, multiple = replace(settings, model=model), STRIDE * int(model.rpartition("/")[2])
    if settings.side % multiple:
        raise UserError(f"side={settings.side}: model={model} needs multiples of {multiple}")
    title = f"Sampling with {model}, {settings.steps} steps, guidance scale {settings.cfg_scale}\n"
    title += f"{settings.side} px, {settings.dtype}, {form(settings.compile)}, batch {settings.batch}, "
    report = Report("pipeline", settings, argv, f"{title}{settings.rounds} rounds in turn")
    rows = measure(settings)
    report.begin(COLUMNS)
    report.add(rows)
    print(f"{rows[0]['ratio']:.3f} times the rate of the chain with {PEER}: speed alone, not at equal quality")
    report.end()
    return 0


def measure(settings: PipelineSettings) -> list[dict[str, Any]]:
    """Rows of our chain and of the usual one in both memory formats; `ratio` is to the better of those."""
    chains = [(OURS + settings.decoder, True), (PEER, False), (PEER, True)]
    shared = {key: value for key, value in asdict(settings).items() if key not in ("decoder", "rounds", "json")}
    jobs = [{"module": "pipeline", "network": name, "channels_last": last, **shared} for name, last in chains]
    rows = []
    for (name, last), found in zip(chains, measure_in_turn(jobs, settings.rounds), strict=True):
        stages = found["stages"]
        parts = {f"{stage}_seconds": rates(seconds, settings.batch)["median"] for stage, seconds in stages.items()}
        total = [sum(both) for both in zip(*stages.values(), strict=True)]
        layout = "own" if name.startswith(OURS) else "channels_last" if last else "contiguous"
        row = {"network": name, "layout": layout, **shared, "parameters": found["parameters"]}
        row |= {"gflop": found["flop"] / 1e9, **parts, "stages": stages} | rates(total, settings.batch)
        rows.append(row | {"peak_memory_bytes": found["peak_memory_bytes"]})
    best = min(rows[1:], key=lambda row: row["median"])
    return [row | {"ratio": ratio(best["seconds"], row["seconds"])} for row in rows]


def prepare(job: dict[str, Any], device: torch.device) -> Work:
    """One chain: `sample` draws latents as `dit task=sample` does, `decode` makes images of them."""
    network, stride, channels = build(job["network"], ENCODER, job["dtype"], job["channels_last"], device)
    side, batch, dtype = job["side"], job["batch"], DTYPES[job["dtype"]]
    model = DiT.from_name(job["model"], side // stride, channels, CLASSES, learn_sigma=False)
    fill_zeros(model)
    model.eval().to(device)
    cfg = SamplingConfig(steps=job["steps"], cfg_scale=job["cfg_scale"])
    decode = decoding(network, 1, torch.randn(batch, 3, side, side, device=device), job["channels_last"])
    drawn = torch.randn(batch, channels, side // stride, side // stride)

    def latents(images: int, cfg: SamplingConfig) -> Tensor:
        indices = range(images)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return draw(model, indices, sample_labels(indices, CLASSES, cfg.seed), cfg)

    def sample() -> None:
        drawn.copy_(latents(batch, cfg))

    flop = SAMPLERS[cfg.sampler].evaluations(cfg.steps) * count_forward_flop(lambda: latents(1, replace(cfg, steps=1)))
    flop += count_forward_flop(lambda: decode(drawn[:1].to(device, dtype)))
    if job["compile"]:
        model.compile(dynamic=False)
        compile_network(network)
    stages = {"sample": sample, "decode": lambda: decode(drawn.to(device, dtype))}
    return Work(stages, parameter_count(model) + parameter_count(network.decoder), flop)
