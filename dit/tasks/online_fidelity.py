"""Online gFID: how far a few samples of a generator in training are from the images of its cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dit.config import DiTConfig
from dit.model import DiT
from dit.tasks.build import Cache
from dit.tasks.cache_images import CacheImages
from dit.tasks.sample import sample_labels
from dit.tasks.sample_decoder import SampleDecoder
from ssdd.engine.errors import UserError
from ssdd.engine.pretrained import find, has
from ssdd.engine.processes import Processes
from ssdd.fidelity.features import AUTOMATIC, load_networks
from ssdd.fidelity.frechet import frechet_distance
from ssdd.fidelity.kid import kernel_distance
from ssdd.fidelity.measure import measure_once
from ssdd.fidelity.moments import FeatureStatistics
from ssdd.fidelity.stored_sets import ImageSet, Treatment
from ssdd.images.dataset import ImageDataset
from ssdd.images.sources import open_source

REFERENCE_IMAGES = 10_000  # of the train split at most, evenly over its classes


class OnlineFidelity:
    """KID and Frechet distance of `training.fidelity_samples` samples on one feature network.

    The network is Inception if its weights are found, else EfficientNet-Lite0. Features of the real images are measured
    once for all runs below ckpt_dir. UserError when `dataset` is not what the cache was built from, or the weights of
    neither network are found.
    """

    def __init__(self, cfg: DiTConfig, cache: Cache, samples: SampleDecoder, processes: Processes):
        if cfg.training.fidelity_samples < 2:
            raise UserError(f"training.fidelity_samples={cfg.training.fidelity_samples}: expected 2 or more")
        self.samples, self.processes = samples, processes
        self.count, self.batch_size = cfg.training.fidelity_samples, cfg.sampling.batch_size
        name = next((name for name in AUTOMATIC if has(name)), None)
        if name is None:
            find(AUTOMATIC[0])  # says how to get it
        self.network = load_networks([name], processes.device)[0]
        CacheImages(cfg.dataset, cache)
        limit = min(cfg.dataset.limit or REFERENCE_IMAGES, REFERENCE_IMAGES)
        dataset = replace(cfg.dataset, limit=limit)
        reals = _Reals(ImageDataset(open_source(dataset, "train"), dataset, train=False))
        folder = Path(cfg.ckpt_dir) / "cache" / "fidelity"
        with processes.main_first():
            self.reals = measure_once(reals, self.network, 64, folder)

    def measure(self, model: DiT) -> dict[str, float]:
        """{fidelity/kid_NETWORK, fidelity/frechet_NETWORK}; every process draws its share, all get the figures."""
        statistics, sampling = FeatureStatistics(self.network.dim), self.samples.sampling
        rank, world = self.processes.rank, self.processes.world
        for start in range(0, self.count, self.batch_size)[rank::world]:
            indices = range(start, min(start + self.batch_size, self.count))
            labels = sample_labels(indices, self.samples.num_classes, sampling.seed, sampling.balanced)
            statistics.update(self.network(self.samples.images(model, indices, labels)), torch.tensor(indices))
        statistics.reduce()
        found, name = statistics.compute(), self.network.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few samples are the point: the figure is for comparing checkpoints
            frechet = frechet_distance(found, self.reals)
        kid = kernel_distance(found.features, self.reals.features)
        return {f"fidelity/kid_{name}": kid, f"fidelity/frechet_{name}": frechet}


class _Reals(ImageSet):
    """Images of a source as a set to measure."""

    def __init__(self, dataset: ImageDataset):
        treatment = Treatment(dataset.cfg.crop, (dataset.cfg.im_size,) * 2)
        super().__init__(Path(dataset.source.name), treatment, {}, len(dataset))
        self.dataset = dataset

    def fingerprint(self) -> str:
        return self.dataset.source.fingerprint()

    def _images(self, indices: range) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            yield index, self.dataset[index][0].permute(1, 2, 0).numpy()
