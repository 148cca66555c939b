"""What is seen of a generator in training: samples of its averaged weights as pictures, and how far from images."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor

from dit.config import DiTConfig
from dit.model import DiT
from dit.tasks.build import Cache
from dit.tasks.online_fidelity import OnlineFidelity
from dit.tasks.sample_decoder import SampleDecoder, SamplePicture
from ssdd.engine.log import ProgressLog
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.sharding import gathered
from ssdd.engine.training_checks import picture_due


class SampleMonitor:
    """When a run's averaged weights are sampled, drawn and measured; made before training starts."""

    def __init__(self, cfg: DiTConfig, cache: Cache, network: DiT, processes: Processes, precision: Precision):
        training = cfg.training
        self.training, self.processes, self.network = training, processes, network
        samples = SampleDecoder(cfg, cache, precision) if training.tokenizer else None
        self.picture = SamplePicture(samples) if samples and training.sample_every != 0 else None
        measured = training.fidelity_every and not cfg.dry_run  # it stores the features of the images
        self.fidelity = OnlineFidelity(cfg, cache, samples, processes) if measured else None
        self.shown = copy.deepcopy(network).eval() if self.picture or self.fidelity else None

    def due(self, done: int, scheduled: bool) -> bool:
        """Whether to draw or measure anything after `done` steps; scheduled: a checkpoint is due by its number."""
        return self._draws(done, scheduled) or self._measures(done)

    def take(self, done: int, scheduled: bool, averages: Mapping[str, Tensor], progress: ProgressLog) -> None:
        """Draw and measure samples of the `averages` of weights, whatever is due."""
        self.shown.load_state_dict(gathered(self.network.state_dict() | averages))
        if self._draws(done, scheduled) and self.processes.is_main:
            progress.picture(done, "samples", self.picture.draw(self.shown))
        if self._measures(done):
            progress.metrics(done, self.fidelity.measure(self.shown))

    def _draws(self, done: int, scheduled: bool) -> bool:
        return self.picture is not None and picture_due(self.training.sample_every, done, scheduled)

    def _measures(self, done: int) -> bool:
        return self.fidelity is not None and done % self.training.fidelity_every == 0
