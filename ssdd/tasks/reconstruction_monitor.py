"""What is seen of a tokenizer in training: evaluations of its averaged weights, and pictures of what they make."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssdd.config import SSDDConfig
from ssdd.engine.log import ProgressLog
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.random import indexed_noise
from ssdd.engine.sharding import gathered
from ssdd.engine.state import TrainingState
from ssdd.engine.training_checks import picture_due
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8, grid, to_uint8
from ssdd.images.sources import open_source
from ssdd.model.compared_decoders import Row
from ssdd.model.tokenizer import SSDD
from ssdd.tasks.evaluate import Evaluator

SMALLEST_SIDE = 64  # images below this size are enlarged


class ReconstructionMonitor:
    """When a run's averaged weights are evaluated and drawn, and what comes of it; made before training starts."""

    def __init__(self, cfg: SSDDConfig, network: SSDD, processes: Processes, precision: Precision):
        training = cfg.training
        self.training, self.processes, self.network = training, processes, network
        self.evaluator = Evaluator(cfg, processes, precision) if training.eval_freq else None
        drawn = training.sample_every or (training.sample_every is None and self.evaluator is not None)
        self.picture = ReconstructionPicture(cfg, precision) if drawn else None
        self.shown = copy.deepcopy(network) if self.evaluator or self.picture else None

    def evaluates(self, done: int, epoch_steps: int, ended: bool) -> bool:
        """Whether there is an evaluation after `done` steps."""
        if self.evaluator is None:
            return False
        epochs, rest = divmod(done, epoch_steps)
        return ended or (rest == 0 and epochs % self.training.eval_freq == 0)

    def due(self, done: int, evaluating: bool) -> bool:
        """Whether there is anything to evaluate or draw after `done` steps."""
        return evaluating or self._draws(done, evaluating)

    def take(
        self, evaluating: bool, averages: Mapping[str, Tensor], state: TrainingState, progress: ProgressLog
    ) -> list[str]:
        """Do what is due; ["best"] when these `averages` of weights are the best so far, else []."""
        self.shown.load_state_dict(gathered(self.network.state_dict() | averages))
        if self._draws(state.step, evaluating) and self.processes.is_main:
            progress.picture(state.step, "reconstructions", self.picture.draw(self.shown))
        return ["best"] if evaluating and self._is_best(state, progress) else []

    def _draws(self, done: int, evaluating: bool) -> bool:
        return self.picture is not None and picture_due(self.training.sample_every, done, evaluating)

    def _is_best(self, state: TrainingState, progress: ProgressLog) -> bool:
        row = Row("tokenizer", self.shown, self.shown.config["fm_sampler"]["steps"])
        result = self.evaluator.run([row])

        def decided() -> tuple[dict[str, Any], str, float]:
            scores = result["rows"][0]
            return scores, *self.evaluator.deciding(scores, self.training.save_on_best)

        scores, metric, value = self.processes.agree(decided)  # one decision for all, to the last bit
        progress.metrics(state.step, {f"val/{name}": v for name, v in scores.items() if isinstance(v, float)})
        best = state.best
        better = best is None or best["metric"] != metric or value > best["value"]
        if better:
            state.best = {"metric": metric, "value": value, "step": state.step}
        return better


class ReconstructionPicture:
    """The first `show_samples` validation images, and what a tokenizer makes of them."""

    def __init__(self, cfg: SSDDConfig, precision: Precision):
        dataset = ImageDataset(open_source(cfg.dataset, "val"), cfg.dataset, train=False)
        indices = range(max(1, min(cfg.show_samples, len(dataset))))
        self.precision, self.scale = precision, max(1, SMALLEST_SIDE // cfg.dataset.im_size)
        self.originals = dataset.pixels(indices)
        self.noise = indexed_noise(indices, self.originals.shape[1:], cfg.seed, "decoder")

    @torch.no_grad()
    def draw(self, tokenizer: SSDD) -> np.ndarray:
        """uint8 [H, W, 3]: originals in the upper row, below them posterior means decoded as evaluation does."""
        device = self.precision.device
        x = from_uint8(self.originals).to(device, memory_format=torch.channels_last)
        with self.precision.autocast():
            z = tokenizer.encode(x).mode()
            y = tokenizer.decode(z, steps=tokenizer.config["fm_sampler"]["steps"], noise=self.noise.to(device))
        return grid(torch.cat([self.originals, to_uint8(y).cpu()]), columns=len(self.originals), scale=self.scale)
