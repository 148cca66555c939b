"""Real images as the reference of every distance: statistics of a split, or of a given reference, measured once."""

from __future__ import annotations

from pathlib import Path

import torch

from dit.config import DiTConfig
from dit.evaluation.measured_sets import Measuring
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_json
from ssdd.fidelity.measure import Collected, drawn_indices
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.set_to_measure import SetToMeasure
from ssdd.fidelity.statistics import load_statistics, save_statistics
from ssdd.fidelity.stored_sets import Treatment, check_comparable
from ssdd.images.batches import eval_batches
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import to_uint8
from ssdd.images.sources import DatasetConfig, open_source

BATCH = 256


class RealImages:
    """A split of a data set. `measure` in all processes; statistics are then read in any of them."""

    def __init__(self, cfg: DatasetConfig, split: str, measuring: Measuring, cache: Path):
        self.dataset = ImageDataset(open_source(cfg, split), cfg, train=False)
        self.measuring, self.cache = measuring, cache
        self.identity = {
            "split": split,
            "crop": cfg.crop,
            "size": [cfg.im_size, cfg.im_size],
            "count": len(self.dataset),
            "fingerprint": self.dataset.source.fingerprint(),
            "on_corrupt": cfg.on_corrupt,
            "kept_features": min(measuring.kept, len(self.dataset)),
        }
        self._files = {network.name: self._file(network.provenance()) for network in measuring.networks}

    def _file(self, provenance: dict) -> Path:
        return self.cache / f"{sha256_json(self.identity | provenance)}.safetensors"

    def measure(self) -> None:
        """Every process its part of the images, for the networks that have not seen them yet; no image is stored."""
        processes, count = self.measuring.processes, len(self.dataset)
        missing = [network for network in self.measuring.networks if not self._files[network.name].is_file()]
        processes.wait()  # finished work is not looked for any more
        if not missing:
            return
        kept = True if count <= self.measuring.kept else drawn_indices(count, self.measuring.kept)
        collected = [Collected(network, kept) for network in missing]
        rank, world = processes.rank, processes.world
        for x, _, indices in eval_batches(self.dataset, BATCH, rank, world, self.dataset.cfg.reading_processes):
            pixels = to_uint8(x).to(processes.device)
            for network, of_network in zip(missing, collected, strict=True):
                of_network.update(network.outputs(pixels), indices)
        for network, of_network in zip(missing, collected, strict=True):
            of_network.reduce()
            if processes.is_main:
                provenance = network.provenance() | self.identity
                save_statistics(self._files[network.name], of_network.compute(), provenance)
        processes.wait()

    def statistics(self) -> dict[str, Statistics]:
        """Network name -> statistics, all with the features of `kept` images at most."""
        return {name: load_statistics(path)[0] for name, path in self._files.items()}

    def describe(self) -> dict:
        """What a result records of it."""
        return {"source": self.dataset.source.name, **self.identity}


class ForeignReference:
    """A reference made elsewhere, in place of the training images.

    UserError when it is a file of statistics of another network.
    """

    def __init__(self, cfg: DiTConfig, measuring: Measuring, cache: Path):
        self.opened = SetToMeasure(cfg.evaluation.reference, cfg.dataset.im_size, cfg.dataset.crop)
        self.measuring, self.cache = measuring, cache
        for network in measuring.networks:
            self.opened.check_network(network)

    def measure(self) -> None:
        """The main process reads or measures it with its first use."""

    def statistics(self) -> dict[str, Statistics]:
        """Network name -> statistics."""
        return {
            network.name: self.opened.statistics(network, self.measuring.batch_size, cache=self.cache)
            for network in self.measuring.networks
        }

    def describe(self) -> dict:
        treatment = {"crop": self.opened.treatment.crop, "size": self.opened.treatment.size}
        return {"source": str(self.opened.path), "fingerprint": None, **self.opened.describe(), **treatment}


def check_treatment(cfg: DiTConfig, made_of: dict | None, reference: ForeignReference | RealImages) -> str | None:
    """How samples and reference differ in crop or size, or None; UserError unless evaluation.allow_mismatch.

    made_of: what the cache of the generator records of its images; foreign files record nothing.
    """
    size = (cfg.dataset.im_size,) * 2
    samples = Treatment((made_of or {}).get("crop") or "unknown", size)
    foreign = isinstance(reference, ForeignReference)
    other = reference.opened.treatment if foreign else Treatment(cfg.dataset.crop, size)
    problem = check_comparable(samples, other, ("samples", "reference"), allow_mismatch=True)
    if problem and not cfg.evaluation.allow_mismatch:
        raise UserError(
            f"{problem}: a distance between them is not comparable with published ones. Take the reference with the "
            "crop of the cache (dataset.crop), or set evaluation.allow_mismatch=true"
        )
    return problem


def labels_of(labels: torch.Tensor, description: dict) -> str:
    """The label scheme in words."""
    counts = labels.unique(return_counts=True)[1]
    scheme = "balanced: index modulo classes" if description.get("balanced", True) else "drawn at random a sample"
    return f"{scheme}; {len(counts)} classes, {int(counts.min())} to {int(counts.max())} samples each"
