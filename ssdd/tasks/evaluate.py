"""Task `eval`: reconstruction quality of tokenizers, side by side on the same images, latents' noise and metrics.

Decoder noise comes from one generator per image index: the figures depend neither on batch size nor on processes.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ssdd.config import SSDDConfig
from ssdd.engine.checkpoint import resolve
from ssdd.engine.devices import choose_kernels, peak_memory, synchronize
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file
from ssdd.engine.png import save_png
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.provenance import measured_by
from ssdd.engine.random import indexed_noise
from ssdd.engine.run import RunDirectory
from ssdd.fidelity.baselines import PixelPCA, slight_blur
from ssdd.fidelity.features import automatic_without_weights, load_networks
from ssdd.fidelity.measure import SetStatistics, default_cache, measure_once, observe
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.pixel_metrics import PIXEL_METRICS
from ssdd.fidelity.set_metrics import IMAGES_A_DIMENSION, compare, paired_differences
from ssdd.fidelity.stored_sets import SplitImages
from ssdd.images.batches import read_split
from ssdd.images.pixels import from_uint8, grid, to_uint8
from ssdd.losses import perceptual
from ssdd.model.compared_decoders import Row, open_rows
from ssdd.model.tokenizer import SSDD
from ssdd.tasks.build import encoder_option, foreign_encoder
from ssdd.tasks.noise_agreement import noise_agreement

ORIGINALS, REALS = "originals", "reals"
AGREEMENT_IMAGES = 32
log = logging.getLogger(__name__)


class Evaluator:
    """The images, networks and metrics of reconstruction evaluations; made once, run on any rows."""

    def __init__(self, cfg: SSDDConfig, processes: Processes, precision: Precision):
        self.cfg, self.processes, self.precision = cfg, processes, precision
        self.device = processes.device
        self.held_out = SplitImages(replace(cfg.dataset, limit=cfg.evaluation.limit or cfg.dataset.limit), "val")
        self.dataset = self.held_out.dataset
        features, metrics = list(cfg.evaluation.features), cfg.evaluation.metrics
        self.networks = load_networks([*features, *["inception"] * ("FID" in metrics)], self.device)
        self.perceptual = perceptual.load_metrics(metrics, self.device)
        self.left_out = [f"features {name}" for name in automatic_without_weights(features)]
        self.left_out += perceptual.automatic_without_weights(metrics)
        self._fell_back = False
        if self.left_out and processes.is_main:
            log.warning("skipped (weights not found): %s", ", ".join(self.left_out))

    @cached_property
    def _of_originals(self) -> dict[str, Statistics]:
        """Network name -> statistics of the validation images; measured by all processes with their first use."""
        return measure_once(self.held_out, self.networks, self.processes, default_cache())

    @torch.no_grad()
    def run(self, rows: Sequence[Row], baselines: bool = False, reals: bool = False) -> dict[str, Any]:
        """Reconstruct the validation images with every row and score them; all processes together.

        Returns in the main process, {} in the others: {"count", "rows": [{name, steps, PSNR (mean of the images'),
        PSNR_pooled (of all their pixels), SSIM, MSE (times 1000), MAE, perceptual distances, rFID where Inception is,
        power_ratio (of frequencies above 1/4 cycle per pixel, to the originals'), images_per_s, distances: {network:
        scores}}], "floor": {network: scores}, "paired": {network: KID differences}, "pictures": name -> uint8 images}.
        Frechet distances are to the originals (rFID); with `reals`, KID, precision and recall are to as many training
        images, and the floor has what the originals themselves score against those.
        """
        decoded, seconds = 0, defaultdict(float)
        values: dict[str, list[tuple[Tensor, dict[str, Tensor]]]] = defaultdict(list)
        pictures: dict[str, Tensor] = {}
        real = {ORIGINALS: self._of_originals}
        if reals:
            training = SplitImages(replace(self.cfg.dataset, limit=len(self.dataset)), "train")
            real[REALS] = measure_once(training, self.networks, self.processes, default_cache())
        pca = self._pca(rows[0].tokenizer) if baselines else None
        names = [row.name for row in rows] + ([] if pca is None else [f"PCA-{pca.pca.n_components_}", "blur"])
        sets = {name: SetStatistics(self.networks) for name in names}
        for pixels, indices in self.held_out.batches(
            self.cfg.evaluation.batch_size, self.processes.rank, self.processes.world
        ):
            x = from_uint8(pixels).to(self.device, memory_format=torch.channels_last)
            originals = pixels.to(self.device)
            images = {ORIGINALS: originals}
            noise = indexed_noise(indices, x.shape[1:], self.cfg.seed, "decoder").to(self.device)
            for row in rows:
                with self.precision.autocast():
                    z = row.tokenizer.encode(x).mode()
                    if row.name not in seconds:
                        row.tokenizer.decode(z, steps=row.steps, noise=noise)  # not timed: first calls choose kernels
                    synchronize(self.device)
                    began = time.perf_counter()
                    images[row.name] = to_uint8(row.tokenizer.decode(z, steps=row.steps, noise=noise))
                    synchronize(self.device)
                    seconds[row.name] += time.perf_counter() - began
            decoded += len(x)
            if pca is not None:
                images[names[-2]] = pca.decode(pca.encode(pixels)).to(self.device)
                images[names[-1]] = slight_blur(originals)
            features = {name: network.features(x) for name, network in self.perceptual.items()}
            for name, batch in images.items():
                if name != ORIGINALS:
                    sets[name].add(observe(batch, self.networks), indices)
                    values[name].append((indices, self._image_metrics(batch, originals, features)))
                kept = pictures.get(name, batch[:0].cpu())
                pictures[name] = torch.cat([kept, batch[: self.cfg.show_samples - len(kept)].cpu()])
        means = self._means(values)
        for collected in sets.values():
            collected.reduce(self.processes)
        skipped = {
            i: where for part in self.processes.gather_objects(self.dataset.corrupt) for i, where in part.items()
        }
        if not self.processes.is_main:
            return {}
        statistics = real | {name: collected.compute() for name, collected in sets.items()}
        result = self._summarise(statistics, means, rows) | {
            "left_out": self.left_out,
            "skipped": [skipped[i] for i in sorted(skipped)],
            "count": len(self.dataset) - len(skipped),
        }
        for row in result["rows"]:
            if seconds[row["name"]]:
                row["images_per_s"] = decoded / seconds[row["name"]] * self.processes.world
        return result | {"pictures": pictures}

    def deciding(self, scores: dict[str, Any], wanted: str) -> tuple[str, float]:
        """(metric, value where more is better) that decides what `best` is: `wanted`, or PSNR where that cannot be
        used.

        FID cannot with fewer than ten images per feature dimension, where it is mostly bias. Warns once that PSNR
        decides.
        """
        key = "rFID" if wanted == "FID" else wanted
        needed = IMAGES_A_DIMENSION * max((n.dim for n in self.networks if n.name == "inception"), default=0)
        if key not in scores:
            reason = "it is not measured here"
        elif wanted == "FID" and len(self.dataset) < needed:
            reason = f"{len(self.dataset)} images are fewer than the {needed} that a Frechet distance needs"
        else:
            more_is_better = wanted in PIXEL_METRICS and PIXEL_METRICS[wanted].better == "↑"
            return wanted, scores[key] if more_is_better else -scores[key]
        if not self._fell_back:
            log.warning("training.save_on_best=%s: %s; PSNR selects the best checkpoint", wanted, reason)
        self._fell_back = True
        return "PSNR", scores["PSNR"]

    def _image_metrics(self, images: Tensor, originals: Tensor, features: dict[str, Any]) -> dict[str, Tensor]:
        """Metric -> its values for each image, on 8-bit pixels: float64 [n] or [n, k], on the CPU.

        features: those of the originals, for every perceptual distance.
        """
        columns = {name: metric.measure(images, originals) for name, metric in PIXEL_METRICS.items()}
        for name, network in self.perceptual.items():
            columns[name] = network.distance(network.features(from_uint8(images)), features[name])
        return {name: column.double().cpu() for name, column in columns.items()}

    def _means(self, values: dict[str, list[tuple[Tensor, dict[str, Tensor]]]]) -> dict[str, dict[str, float]]:
        """Row -> metric -> its figure for all images of all processes, summed in the order of their indices."""
        merged: dict[str, list[tuple[Tensor, dict[str, Tensor]]]] = defaultdict(list)
        for part in self.processes.gather_objects(dict(values)):
            for name, batches in part.items():
                merged[name] += batches
        means: dict[str, dict[str, float]] = defaultdict(dict)
        for name, batches in merged.items():
            order = torch.cat([indices for indices, _ in batches]).argsort()
            for key in batches[0][1]:
                mean = torch.cat([columns[key] for _, columns in batches])[order].mean(dim=0)
                means[name][key] = PIXEL_METRICS[key].pool(mean) if key in PIXEL_METRICS else mean.item()
        return dict(means)

    def _summarise(
        self, statistics: dict[str, dict[str, Statistics]], means: dict[str, dict[str, float]], rows: Sequence[Row]
    ) -> dict[str, Any]:
        """Rows, floor and paired differences. statistics: set name -> network name -> of that set."""
        steps, reals = {row.name: row.steps for row in rows}, REALS if REALS in statistics else None
        table = [{"name": name, "steps": steps.get(name), **means[name], "distances": {}} for name in means]
        result: dict[str, Any] = {"count": 0, "rows": table, "floor": {}, "paired": {}, "features": {}}
        for network in self.networks:
            sets = {name: of_networks[network.name] for name, of_networks in statistics.items()}
            resamples, seed = self.cfg.evaluation.resamples, self.cfg.seed
            names = [*means, ORIGINALS] if reals else list(means)
            compared, kernels = compare(sets, names, ORIGINALS, reals, resamples, seed)
            for row in table:
                row["distances"][network.name] = compared[row["name"]]
                if network.name == "inception":
                    row["rFID"] = compared[row["name"]]["frechet"]
            result["features"][network.name] = network.checksum
            if not reals:
                continue
            frechet = compare(sets, [ORIGINALS], REALS, None, resamples, seed)[0][ORIGINALS]
            result["floor"][network.name] = compared[ORIGINALS] | frechet
            result["paired"][network.name] = paired_differences(kernels, list(means))
        return result

    def _pca(self, tokenizer: SSDD) -> PixelPCA:
        """Fitted to the training images, with as many numbers as a latent of `tokenizer`."""
        side = self.cfg.dataset.im_size // tokenizer.f
        return PixelPCA(read_split(self.cfg.dataset, "train")[0], tokenizer.z_dim * side * side)


def _rows_of_checkpoint(cfg: SSDDConfig, device: torch.device) -> list[Row]:
    """`ssdd.checkpoint` at every step count; where a frozen diffusers encoder is now, `ssdd.encoder` may change it."""
    encoder = encoder_option(cfg)
    changes: dict[str, Any] = {"fm_sampler": {"t_pow_shift": cfg.ssdd.fm_sampler.t_pow_shift}}
    changes |= {"encoder": encoder} if foreign_encoder(encoder) else {}
    tokenizer = SSDD.from_pretrained(cfg.ssdd.checkpoint, cfg.ckpt_dir, **changes)
    counts = cfg.evaluation.steps or [cfg.ssdd.fm_sampler.steps]
    if tokenizer.config["fm_sampler"]["steps"] == 1 < max(counts):
        log.warning("%s was trained for one step; ssdd.fm_sampler.steps=1 evaluates that", cfg.ssdd.checkpoint)
    tokenizer.to(device).eval().requires_grad_(False)
    checksum = sha256_file(resolve(cfg.ssdd.checkpoint, cfg.ckpt_dir))
    return [Row(f"steps-{n}", tokenizer, n, cfg.ssdd.checkpoint, checksum) for n in counts]


def run(cfg: SSDDConfig) -> dict[str, Any]:
    """Evaluate `evaluation.decoders`, or `ssdd.checkpoint` at `evaluation.steps`; writes task_result.json, pictures.

    Returns what it writes, {} but in the main process.
    """
    processes = Processes.join()
    precision = Precision.resolve(cfg.training.mixed_precision, processes.device, measuring=True)
    choose_kernels(tf32=False)
    rows = open_rows(cfg.evaluation.decoders, cfg.ckpt_dir, processes.device)
    if not rows:
        if cfg.ssdd.checkpoint is None:
            raise UserError(
                "task=eval needs ssdd.checkpoint=<run or file>, or evaluation.decoders=[name:reference:steps]"
            )
        rows = _rows_of_checkpoint(cfg, processes.device)
    counts = cfg.evaluation.steps or [cfg.ssdd.fm_sampler.steps]
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise UserError(f"evaluation.steps={counts}: expected different numbers of steps, 1 or more")
    if cfg.evaluation.noise_draws == 1:
        raise UserError("evaluation.noise_draws=1 has no spread; set 2 or more, or 0 to disable it")
    for row in rows:
        row.tokenizer.check_image_size(cfg.dataset.im_size, cfg.dataset.im_size)
    evaluator = Evaluator(cfg, processes, precision)
    result = evaluator.run(rows, baselines=cfg.evaluation.baselines, reals=True)
    if not processes.is_main:
        return {}
    if cfg.evaluation.noise_draws:
        count = min(AGREEMENT_IMAGES, len(evaluator.dataset))
        x = from_uint8(evaluator.dataset.pixels(range(count))).to(processes.device)
        for row, scores in zip(rows, result["rows"], strict=False):
            with precision.autocast():
                draws, parts = cfg.evaluation.noise_draws, x.split(cfg.evaluation.batch_size)
                scores["noise_r2"] = noise_agreement(row, rows[0], parts, draws, cfg.seed)
    pictures = result.pop("pictures")
    directory = RunDirectory(cfg.ckpt_dir, cfg.run_name)
    directory.save_config(cfg)
    for name, images in pictures.items() if cfg.show_samples else ():
        save_png(directory.pictures / f"{name}.png", grid(images, columns=len(images)))
    result = {
        "task": "eval",
        "data": evaluator.dataset.source.fingerprint(),
        "crop": cfg.dataset.crop,
        "peak_memory_bytes": peak_memory(processes.device),
        "precision": precision.record(),
        "measured": measured_by(processes.device),
        "decoders": {row.name: row.provenance() for row in rows},
        **result,
    }
    directory.write_result(result)
    return result
