"""Training steps of our DiT beside diffusers': `python scripts/bench.py dit key=value`."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit.config import DiTConfig
from dit.convention import convention
from dit.model import NAMES, DiT
from dit.networks import build_objective, loss_weights
from dit.objective import step_draws
from ssdd.engine.config import parse
from ssdd.engine.errors import UserError
from ssdd.engine.optim import build_optimizer
from ssdd.engine.throughput import count_flop
from ssdd.engine.training import peak_memory, synchronize
from ssdd.objective import weighted_sum

CHANNELS, CLASSES, SIDE = 4, 1000, 32
WARM_UP = 2  # steps: kernels are compiled and chosen, the optimizer's state is made
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Settings:
    """Forward, velocity loss, backward and AdamW as `task=train` makes them, on latents of 4 x 32 x 32."""

    model: list[str] = field(default_factory=lambda: ["DiT-S/2", "DiT-B/2"], metadata={"choices": NAMES})
    """Sizes, one table row each."""
    dtype: str = field(default="float32", metadata={"choices": tuple(DTYPES)})
    """bfloat16 is autocast; weights stay float32."""
    compile: bool = False
    """torch.compile both networks."""
    batch: int = 16
    """Latents a step."""
    rounds: int = 5
    """Steps of each network that count; they alternate, so that what else the machine does hits both alike."""


class Diffusers(nn.Module):
    """diffusers' DiT of the shape of `ours`, called as ours is; it predicts the velocity at 1000 t."""

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
    """A table of step times, rates and their ratio, and the same as one line of JSON."""
    settings = parse(Settings, argv, program="bench dit", description=__doc__)
    if settings.batch < 1 or settings.rounds < 1:
        raise UserError("batch and rounds must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    form = "compiled" if settings.compile else "eager"
    print(f"Training step, {settings.dtype}, {form}, batch {settings.batch}, {settings.rounds} rounds in turn")
    print(f"torch {torch.__version__}, {device.type}, {place}")
    print("network              parameters  GFLOP/step   median s      min      max  images/s")
    results = {}
    for name in settings.model:
        results[name] = result = measure(name, settings, device)
        for whose in ("ours", "diffusers"):
            one = result[whose]
            print(
                f"{name:9s} {whose:10s} {one['parameters'] / 1e6:8.2f} M {one['gflop']:11.1f} {one['median']:10.3f} "
                f"{one['min']:8.3f} {one['max']:8.3f} {one['images_per_s']:9.2f}"
            )
        print(f"{name:9s} {result['ratio']:.3f} times the rate of diffusers'", flush=True)
    about = vars(settings) | {"device": device.type, "place": place, "torch": torch.__version__}
    print(json.dumps({**about, "peak_memory_bytes": peak_memory(device), "networks": results}))
    return 0


def measure(name: str, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Seconds and images/s of both networks, and `ratio`: the median over rounds of theirs / our seconds."""
    torch.manual_seed(0)
    ours = DiT.from_name(name, SIDE, CHANNELS, CLASSES, learn_sigma=False)
    prepared = {"ours": Step(ours, settings, device), "diffusers": Step(Diffusers(ours), settings, device)}
    seconds: dict[str, list[float]] = {whose: [] for whose in prepared}
    for number in range(WARM_UP + settings.rounds):
        for whose, step in prepared.items():
            synchronize(device)
            began = time.perf_counter()
            step()
            synchronize(device)
            seconds[whose] += [time.perf_counter() - began] * (number >= WARM_UP)
    result: dict[str, Any] = {
        whose: {
            "parameters": step.parameters,
            "gflop": step.flop / 1e9,
            "median": statistics.median(seconds[whose]),
            "min": min(seconds[whose]),
            "max": max(seconds[whose]),
            "images_per_s": settings.batch / statistics.median(seconds[whose]),
        }
        for whose, step in prepared.items()
    }
    ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    return result | {"ratio": statistics.median(ratios)}


class Step:
    """One training step of a network, always on the same latents, with the objective and optimizer of the trainer."""

    def __init__(self, network: nn.Module, settings: Settings, device: torch.device) -> None:
        cfg = DiTConfig()
        self.objective = build_objective(cfg, network).to(device).train(network.training)
        self.weights, self.dtype, self.device = loss_weights(cfg), DTYPES[settings.dtype], device
        shape = (settings.batch, CHANNELS, SIDE, SIDE)
        self.given = (
            torch.randn(shape, device=device),
            torch.randint(CLASSES, shape[:1], device=device),
            step_draws(cfg, 0, shape, device),
        )
        trained = [p for p in network.parameters() if p.requires_grad]
        groups = [{"params": trained, "weight_decay": cfg.training.weight_decay}]
        self.optimizer = build_optimizer("adamw", groups, cfg.training.lr, (0.9, cfg.training.beta2))
        self.parameters = sum(p.numel() for p in trained)
        self.flop = count_flop(self.loss, trained)
        if settings.compile:
            network.compile()

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return weighted_sum(self.objective(*self.given), self.weights)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
