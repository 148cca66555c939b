"""A set of images made chunk by chunk, and its statistics on feature networks; resumable, no image is stored.

A chunk file holds the networks' outputs of its images. From all of them, in the order of the chunks, come moments
and kept features: the same bits on any number of processes, and however often the work was interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit.evaluation.export_images import write_npz, write_pngs
from ssdd.engine.checkpoint import load_tensors, save_tensors
from ssdd.engine.files import plain, read_json
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.resumable import Chunks, WorkRecord
from ssdd.fidelity.features import FeatureNetwork, Outputs
from ssdd.fidelity.judge import SmallClassifier
from ssdd.fidelity.measure import SetStatistics, kept_of, load_statistics, observe, save_statistics
from ssdd.fidelity.moments import Statistics


class MadeImages(NamedTuple):
    """A chunk of a set."""

    pixels: Tensor  # uint8 [n, 3, H, W]
    indices: Tensor  # int64 [n]; where an unreadable image has a stand-in, that one's
    seconds: float  # that making them took


class Recipe(NamedTuple):
    """How the `count` images of a set are made. request: all that they depend on; make: the images of a chunk."""

    count: int
    request: dict[str, Any]
    make: Callable[[range], MadeImages]


@dataclass(frozen=True)
class Measuring:
    """What sets are measured with. kept: features kept of a set of more images than that.

    precision: that of the tokenizers that make images; feature networks compute in float32. judge: counts how often it
    sees the requested label.
    """

    networks: Sequence[FeatureNetwork]
    processes: Processes
    precision: Precision
    batch_size: int
    kept: int
    judge: SmallClassifier | None = None


@dataclass(frozen=True)
class Export:
    """Where the images of a set go: ADM's npz, a folder of PNG files, or both."""

    npz: Path | None
    png: Path | None

    def done(self) -> bool:
        return all(path is None or path.exists() for path in (self.npz, self.png))


class ImageSetFolder:
    """One set: `measure` in all processes, `finish` in the main one, then its figures can be read.

    labels: requested of the images, int64 [count], for a judge or an npz. shown: images that pictures show. What
    `finish` wrote for the same request is used again.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        measuring: Measuring,
        labels: Tensor | None = None,
        shown: Sequence[int] = (),
        export: Export | None = None,
    ):
        self.folder, self.measuring, self.labels, self.export = folder, measuring, labels, export
        self.count, self.make = recipe.count, recipe.make
        self.shown = torch.tensor(list(shown), dtype=torch.int64)
        self.request = plain(
            recipe.request
            | {
                "count": self.count,
                "batch_size": measuring.batch_size,
                "networks": [[network.name, network.checksum] for network in measuring.networks],
                "kept_features": min(self.count, measuring.kept),
                "device": measuring.processes.device.type,
                "precision": measuring.precision.name,
                "judged": measuring.judge is not None,
                "shown": list(shown),
                "images": export is not None,
            }
        )
        self.record = WorkRecord(folder / "measured.json", {"request": self.request})
        self.chunks = Chunks(folder / "chunks", self.request, self.count, measuring.batch_size)
        self.finished = self._finished()

    def _finished(self) -> bool:
        with_images = WorkRecord(self.record.path, {"request": self.request | {"images": True}})
        measured = self.record.read() or with_images.read()
        return measured is not None and not (self.export and not self.export.done())

    def measure(self) -> None:
        """Make what is missing; every process its own chunks. Returns when all chunks are there."""
        processes = self.measuring.processes
        processes.wait()  # finished work is not looked for any more
        if self.finished:
            processes.print(f"{self.folder}: measured before")
            return
        if processes.is_main:
            self._begin()
        processes.wait()
        for chunk in self.chunks.missing(processes.rank, processes.world):
            images = self.make(chunk)
            self.chunks.save(chunk, self._observed(chunk, images), images.seconds)
            done = min(chunk.start + self.chunks.size * processes.world, self.count)
            if done == self.count or chunk.start // self.chunks.size % 50 == 0:
                processes.print(f"{self.folder.parent.name}, {self.folder.name}: {done} of {self.count}")
        processes.wait()
        if self.export and self.export.png:
            for chunk in self.chunks.ranges[processes.rank :: processes.world]:
                write_pngs(self.export.png, self.chunks.load(chunk)["images"], chunk)
            processes.wait()

    def _begin(self) -> None:
        for path in sorted(self.folder.glob("*.*")):  # measured.json first: it says that the others are there
            path.unlink()
        self.chunks.prepare()
        if self.export and self.export.png:
            shutil.rmtree(self.export.png, ignore_errors=True)

    def _observed(self, chunk: range, images: MadeImages) -> dict[str, Tensor]:
        tensors = {"indices": images.indices}
        on_device = images.pixels.to(self.measuring.processes.device)
        for number, outputs in enumerate(observe(on_device, self.measuring.networks)):
            tensors |= {f"{number}.{key}": part for key, part in outputs._asdict().items() if part is not None}
        pixels = images.pixels.cpu()
        if self.measuring.judge is not None:
            tensors["correct"] = self.measuring.judge.correct(images.pixels, self.labels[list(chunk)])
        if self.export is not None:
            tensors["images"] = pixels
        shown = torch.isin(images.indices, self.shown)
        return tensors | {"shown": pixels[shown], "shown_indices": images.indices[shown]}

    def finish(self) -> None:
        """Statistics of all chunks, and the npz; the chunks are then deleted. Only in the main process."""
        if self.finished:
            return
        networks, device = self.measuring.networks, self.measuring.processes.device
        collected = SetStatistics(networks, kept_of(self.count, self.measuring.kept))
        parts: dict[str, list[Tensor]] = {"shown": [], "shown_indices": [], "correct": []}
        for chunk in self.chunks.ranges:
            tensors = self.chunks.load(chunk)
            on_device = {key: part.to(device) for key, part in tensors.items()}
            of_networks = (
                Outputs(*(on_device.get(f"{number}.{key}") for key in Outputs._fields))
                for number in range(len(networks))
            )
            collected.add(list(of_networks), tensors["indices"])
            for key, rows in parts.items():
                rows += [tensors[key]] if key in tensors else []
        statistics = collected.compute()
        for number, network in enumerate(networks):
            provenance = network.provenance() | {"crop": "none", "size": None} | self.request
            save_statistics(self._statistics(number), statistics[network.name], provenance)
        shown = {key: torch.cat(parts[key]) for key in ("shown", "shown_indices")}
        save_tensors(self.folder / "shown.safetensors", shown)
        if self.export and self.export.npz:
            images = (self.chunks.load(chunk)["images"] for chunk in self.chunks.ranges)
            write_npz(self.export.npz, images, self.count, self.labels)
        self.record.write(
            images_per_s=self.chunks.samples_per_s() * self.measuring.processes.world,
            class_accuracy=torch.cat(parts["correct"]).double().mean().item() if parts["correct"] else None,
        )
        self.chunks.remove()
        self.finished = True

    def statistics(self, network: FeatureNetwork) -> Statistics:
        """Statistics of the finished set on `network`."""
        return load_statistics(self._statistics(list(self.measuring.networks).index(network)))[0]

    def figures(self) -> dict[str, Any]:
        """images_per_s of making them, over all processes; class_accuracy, or None without a judge."""
        return read_json(self.record.path)

    def pictures(self) -> dict[int, Tensor]:
        """The shown images, uint8 [3, H, W], by index."""
        tensors = load_tensors(self.folder / "shown.safetensors")
        return dict(zip(tensors["shown_indices"].tolist(), tensors["shown"], strict=True))

    def _statistics(self, number: int) -> Path:
        return self.folder / f"statistics-{number}.safetensors"
