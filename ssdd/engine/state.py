"""The state of a training run: named parts that know their own tensors and values, kept together in checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssdd.engine import checkpoint
from ssdd.engine.ema import Ema
from ssdd.engine.errors import UserError
from ssdd.engine.log import ProgressLog
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.run import RunDirectory
from ssdd.engine.running_means import RunningMeans
from ssdd.engine.sharding import gathered, laid_out_as, load_whole
from ssdd.engine.training_checks import check_identity


class Part(Protocol):
    """What a checkpoint stores in its own file, and in state.json. Every process calls."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Live tensors, whole or sharded; without any, there is no file."""

    def values(self) -> dict[str, Any]:
        """JSON values, under names that other parts use for equal ones only."""

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continue with what `tensors` and `values` gave; `values` has those of all parts."""


@dataclass
class TrainingState:
    """How far a run is, and all that its next step reads besides its config.

    identity: JSON values that must not change while the run goes on. parts: by the names of their files.
    metadata: of every weights file. precision: that of the steps to come; earlier: names of those before it;
    before: that of the last step, None for a new run.
    best: which evaluation was the best, where a run is evaluated.
    """

    directory: RunDirectory
    processes: Processes
    identity: dict[str, Any]
    parts: Mapping[str, Part]
    metadata: Mapping[str, str]
    precision: Precision
    keep: int = 0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    earlier: list[str] = field(default_factory=list)
    before: str | None = None
    _began: float = field(default_factory=time.perf_counter)

    def restore(self, steps: int) -> None:
        """Continue where the run's last checkpoint stands, if there is one.

        UserError when that is of another identity, or beyond `steps`.
        """
        last = self.directory.last
        if not checkpoint.exists(last):
            return
        tensors, values = checkpoint.load(last)
        check_identity(values["identity"], self.identity, last)
        if values["step"] > steps:
            raise UserError(
                f"{last} is at step {values['step']}, beyond training.steps={steps}; choose another run_name"
            )
        for name, part in self.parts.items():
            part.load(tensors.get(name, {}), values)
        self.step, self.metrics = values["step"], values["metrics"]
        self.best, names = values.get("best"), values.get("precisions", [])
        self.before = names[-1] if names else None
        self.earlier = names[:-1] if self.before == self.precision.name else names
        self._began = time.perf_counter() - values["seconds"]

    def log(self, steps: int, title: str, wandb: str | None) -> ProgressLog:
        """The log of the steps that are left of `steps`."""
        return ProgressLog(
            steps,
            description=title,
            run=self.directory,
            start=self.step,
            main_process=self.processes.is_main,
            wandb=wandb,
        )

    def headline(self) -> str:
        """The first line of the log; says so where the run goes on in another precision than before."""
        changed = "" if self.before in (None, self.precision.name) else f"; {self.before} until step {self.step}"
        return f"precision {self.precision}{changed}"

    def result(self, steps: int, batch_size: int, trained: Iterable[Tensor]) -> dict[str, Any]:
        """What every training result records: how far the run is and how fast it went; batch_size: of a step."""
        done = steps * batch_size
        return {
            "steps": steps,
            "images": done,
            **self.metrics,
            "parameters": sum(parameter.numel() for parameter in trained),
            "precision": self.precision.record() | ({"earlier": self.earlier} if self.earlier else {}),
            "checkpoint": str(self.directory.last),
            "seconds": self.seconds,
            "images_per_s": done / max(self.seconds, 1e-9),
        }

    @property
    def seconds(self) -> float:
        """What the run has taken so far, in all the processes that worked on it one after the other."""
        return time.perf_counter() - self._began

    def save(self, *names: str) -> None:
        """Write a checkpoint under the first name, link the others to it, and wait until all processes may continue."""
        groups = {name: part.tensors() for name, part in self.parts.items()}
        values = {key: value for part in self.parts.values() for key, value in part.values().items()}
        values |= {key: getattr(self, key) for key in ("identity", "step", "metrics", "best", "seconds")}
        values["precisions"] = [*self.earlier, self.precision.name]
        whole = {name: gathered(group, keep=self.processes.is_main) for name, group in groups.items() if group}
        if self.processes.is_main:
            folder = self.directory.checkpoints
            checkpoint.save(folder / names[0], whole, values, self.metadata)
            for name in names[1:]:
                checkpoint.link(folder / names[0], folder / name)
            if self.keep:
                checkpoint.keep_newest(folder, self.keep)
        self.processes.wait()


class Weights:
    """A network's, with its buffers."""

    def __init__(self, network: nn.Module):
        self.network = network

    def tensors(self) -> Mapping[str, Tensor]:
        return self.network.state_dict()

    def values(self) -> dict[str, Any]:
        return {}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        load_whole(self.network, tensors)


class Average:
    """A moving average, with what else `network` has, so that the file is a whole network's.

    The averages of a run count the same updates, so they share one value.
    """

    def __init__(self, ema: Ema, network: nn.Module | None = None):
        self.ema, self.network = ema, network

    def tensors(self) -> Mapping[str, Tensor]:
        return ({} if self.network is None else self.network.state_dict()) | self.ema.tensors()

    def values(self) -> dict[str, Any]:
        return {"ema": self.ema.state()}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.ema.load({name: tensors[name] for name in self.ema.tensors()}, values["ema"])


class OptimizerState:
    """An optimizer's; name: of its values."""

    def __init__(self, optimizer: torch.optim.Optimizer, name: str = "optimizer"):
        self.optimizer, self.name = optimizer, name

    def tensors(self) -> Mapping[str, Tensor]:
        return checkpoint.optimizer_tensors(self.optimizer)[0]

    def values(self) -> dict[str, Any]:
        return {self.name: checkpoint.optimizer_tensors(self.optimizer)[1]}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        checkpoint.load_optimizer(self.optimizer, tensors, values[self.name])


class Auxiliary:
    """What only training needs: heads of losses, running means, the loss scale."""

    def __init__(
        self,
        heads: Mapping[str, Tensor],
        means: RunningMeans,
        scaler: torch.amp.GradScaler,
        processes: Processes,
    ):
        self.heads, self.means, self.scaler, self.processes = heads, means, scaler, processes

    def tensors(self) -> Mapping[str, Tensor]:
        return {"windows": self.processes.gather(self.means.sums.unsqueeze(0)), **self.heads}

    def values(self) -> dict[str, Any]:
        scale = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        return {"window_steps": dict(self.means.steps)} | scale

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        for name, head in self.heads.items():
            head.copy_(laid_out_as(head, tensors[name]))
        self.means.load(tensors["windows"], values["window_steps"], self.processes)
        if self.scaler.is_enabled() and "scaler" in values:
            self.scaler.load_state_dict(values["scaler"])
