"""Training steps of our DiT compared with diffusers': `python scripts/bench.py dit key=value`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.ceilings import CALLS
from bench.networks import import_diffusers
from bench.processes import Work, measure_in_turn
from bench.report import GFLOP, MEMORY, PARAMETERS, RATE, SECONDS, Report, rates, ratio
from bench.settings import DTYPES, Forms, check_lists, check_positive, form
from dit.config import DiTConfig
from dit.model import DiT
from dit.objective import step_draws
from dit.options import NAMES
from dit.tasks.build import build_objective, loss_weights
from dit.time_convention import convention
from ssdd.engine.cli import parse
from ssdd.engine.optim import build_optimizer
from ssdd.engine.tables import Column
from ssdd.engine.throughput import count_flop, peak_flops
from ssdd.losses.objective import weighted_sum

CHANNELS, CLASSES, SIDE = 4, 1000, 32
OURS, DIFFUSERS = "ours", "diffusers"
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}  # as the trainer's MFU calls them
COLUMNS = (
    Column("model", "model", 9),
    Column("network", "network", 10),
    PARAMETERS,
    GFLOP,
    *SECONDS,
    RATE,
    MEMORY,
    Column("MFU %", "mfu", 7, 1, 100),
)


@dataclass
class DiTSettings(Forms):
    """Forward, velocity loss, backward and AdamW as `task=train` makes them, on latents of 4 x 32 x 32; each network
    in its own process."""

    model: list[str] = field(default_factory=lambda: ["DiT-S/2", "DiT-B/2"], metadata={"choices": NAMES})
    """Sizes, one table row each."""
    batch: int = 16
    """Latents per step."""


class Diffusers(nn.Module):
    """diffusers' DiT of the shape of `ours`, called like it; it predicts the velocity at 1000 t."""

    convention = convention("flow", 1000.0)

    def __init__(self, ours: DiT) -> None:
        from diffusers import DiTTransformer2DModel

        super().__init__()
        config = ours.config
        self.model = DiTTransformer2DModel(
            num_attention_heads=config["heads"],
            attention_head_dim=config["width"] // config["heads"],
            in_channels=CHANNELS,
            num_layers=config["depth"],
            sample_size=SIDE,
            patch_size=config["patch_size"],
            num_embeds_ada_norm=CLASSES,
        )
        self.in_channels, self.num_classes = CHANNELS, CLASSES
        self.eval()  # the objective drops the labels; nothing else in it depends on the mode

    def compile(self) -> None:
        self.model.compile()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, keep: None = None) -> Tensor:
        return self.model(x, timestep=t, class_labels=y, return_dict=False)[0]


def dit(argv: list[str]) -> int:
    """A table of step times, rates and their ratio for each dtype and form, and the same as one line of JSON."""
    settings = parse(DiTSettings, argv, program="bench dit", description=__doc__)
    check_positive(settings, "batch", "rounds")
    check_lists(settings, "model", "dtype", "compile")
    report = Report("dit", settings, argv, f"Training step, batch {settings.batch}, {settings.rounds} rounds in turn")
    peaks = {dtype: peak_flops(report.device, PRECISIONS[dtype], CALLS) for dtype in settings.dtype}
    report.record(peak_flops=peaks)
    for dtype, compiled in itertools.product(settings.dtype, settings.compile):
        print(f"\n{dtype}, {form(compiled)}")
        report.begin(COLUMNS)
        for name in settings.model:
            rows = measure(name, settings, dtype, compiled, peaks[dtype])
            report.add(rows)
            print(f"{name} {rows[0]['ratio']:.3f} times the rate of diffusers'", flush=True)
    report.end()
    return 0


def measure(name: str, settings: DiTSettings, dtype: str, compiled: bool, peak: float | None) -> list[dict[str, Any]]:
    """A row for each network. `ratio`: to diffusers', the median over rounds."""
    shared = {"model": name, "dtype": dtype, "compile": compiled, "batch": settings.batch}
    jobs = [{"module": "dit", "network": network, **shared} for network in (OURS, DIFFUSERS)]
    found = measure_in_turn(jobs, settings.rounds)
    theirs = found[1]["stages"]["step"]
    rows = []
    for job, one in zip(jobs, found, strict=True):
        seconds = one["stages"]["step"]
        row = {"network": job["network"], **shared, "parameters": one["parameters"], "gflop": one["flop"] / 1e9}
        row |= rates(seconds, settings.batch) | {"peak_memory_bytes": one["peak_memory_bytes"]}
        row["mfu"] = None if peak is None else settings.batch * one["flop"] / row["median"] / peak
        rows.append(row | {"ratio": ratio(theirs, seconds)})
    return rows


def prepare(job: dict[str, Any], device: torch.device) -> Work:
    """Training steps of one network, always on the same latents, with the objective and optimizer of the trainer."""
    import_diffusers(required=True)
    torch.manual_seed(0)
    network: nn.Module = DiT.from_name(job["model"], SIDE, CHANNELS, CLASSES, learn_sigma=False)
    if job["network"] == DIFFUSERS:
        network = Diffusers(network)
    cfg, dtype = DiTConfig(), DTYPES[job["dtype"]]
    objective = build_objective(cfg, network).to(device).train(network.training)
    weights = loss_weights(cfg)
    shape = (job["batch"], CHANNELS, SIDE, SIDE)
    latents, labels = torch.randn(shape, device=device), torch.randint(CLASSES, shape[:1], device=device)
    draws = step_draws(cfg, 0, shape, device)
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": cfg.training.weight_decay}]
    optimizer = build_optimizer("adamw", groups, cfg.training.lr, cfg.training.betas)

    def loss(images: int) -> Tensor:
        part = slice(images)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return weighted_sum(objective(latents[part], labels[part], draws.rows(part)), weights)

    def step() -> None:
        loss(job["batch"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    flop = count_flop(lambda: loss(1), trained)
    if job["compile"]:
        network.compile()
    return Work({"step": step}, sum(p.numel() for p in trained), flop)
