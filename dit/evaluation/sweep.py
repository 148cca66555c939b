"""How distances depend on guidance and steps of the sampler: a small set for every setting, and a plot."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit.config import DiTConfig
from dit.evaluation.latent_sets import SampleSet, decoded
from dit.evaluation.measured_sets import ImageSetFolder, Measuring
from dit.tasks import sample
from ssdd.engine.files import write_atomic
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.set_metrics import compare
from ssdd.model.compared_decoders import Row

REFERENCE = "/reference"  # among decoders, whose names have no slash


@dataclass
class Setting:
    """A point of the sweep: values of two sampling keys, and what the decoders make of its latents."""

    cfg_scale: float
    steps: int
    sets: dict[str, ImageSetFolder]


class Sweep:
    """`measure` in all processes, then `compare` in the main one. Every setting has its own folder and resumes."""

    def __init__(self, cfg: DiTConfig, out: Path, rows: Sequence[Row], measuring: Measuring):
        self.cfg, self.out, self.rows, self.measuring = cfg, out, rows, measuring
        self.settings: list[Setting] = []

    def measure(self) -> None:
        """Draw and decode the set of every setting."""
        options, sampling = self.cfg.evaluation, self.cfg.sampling
        scales, steps = options.sweep_cfg or [sampling.cfg_scale], options.sweep_steps or [sampling.steps]
        for scale, count in itertools.product(scales, steps):
            folder = self.out / "sweep" / f"cfg-{scale:g}-steps-{count}"
            small = replace(sampling, n=options.sweep_n, cfg_scale=scale, steps=count)
            samples = SampleSet(sample.run(replace(self.cfg, sampling=small, out=str(folder / "samples"))))
            sets = {row.name: self._measured(row, samples, folder) for row in self.rows}
            self.settings.append(Setting(scale, count, sets))

    def _measured(self, row: Row, samples: SampleSet, folder: Path) -> ImageSetFolder:
        recipe = decoded(row, samples.norm(row), samples, self.cfg.sampling.seed, self.measuring.precision)
        image_set = ImageSetFolder(folder / row.name, recipe, self.measuring)
        image_set.measure()
        return image_set

    def compare(self, reference: Mapping[str, Statistics]) -> list[dict[str, Any]]:
        """One line per setting: {cfg_scale, steps, n, distances: {decoder: {network: scores}}}; writes sweep.svg."""
        lines = []
        for setting in self.settings:
            distances: dict[str, dict[str, Any]] = {row.name: {} for row in self.rows}
            for image_set in setting.sets.values():
                image_set.finish()
            for network in self.measuring.networks:
                sets = {name: image_set.statistics(network) for name, image_set in setting.sets.items()}
                sets[REFERENCE] = reference[network.name]
                resamples, seed = self.cfg.evaluation.resamples, self.cfg.sampling.seed
                compared = compare(sets, list(setting.sets), REFERENCE, REFERENCE, resamples, seed)[0]
                for name, scores in compared.items():
                    distances[name][network.name] = scores
            n = self.cfg.evaluation.sweep_n
            lines.append({"cfg_scale": setting.cfg_scale, "steps": setting.steps, "n": n, "distances": distances})
        write_atomic(self.out / "sweep.svg", plot(lines))
        return lines


def plot(lines: Sequence[dict[str, Any]]) -> bytes:
    """SVG of Frechet distance against guidance (a curve per decoder and step count) and steps; one row per network."""
    import matplotlib
    from matplotlib.figure import Figure

    decoders = list(lines[0]["distances"])
    networks = list(lines[0]["distances"][decoders[0]])
    figure = Figure(figsize=(9, 3.6 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 2, squeeze=False)
    for row, network in zip(axes, networks, strict=True):
        for panel, x, other in ((row[0], "cfg_scale", "steps"), (row[1], "steps", "cfg_scale")):
            for decoder, value in itertools.product(decoders, sorted({line[other] for line in lines})):
                own = sorted((line for line in lines if line[other] == value), key=lambda line: line[x])
                distances = [line["distances"][decoder][network]["frechet"] for line in own]
                panel.plot([line[x] for line in own], distances, marker="o", label=f"{decoder}, {other} {value:g}")
            panel.set(xlabel=x, ylabel=f"Frechet distance, {network.split(':')[0]}, {lines[0]['n']} samples")
            panel.legend(fontsize="small")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sweep"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
