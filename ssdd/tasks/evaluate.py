"""Task `eval`: reconstruction quality of tokenizers, side by side on the same images, latents' noise and metrics.

Decoder noise comes from one generator per image index: the figures depend neither on batch size nor on processes.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
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
from ssdd.fidelity.compare import IMAGES_A_DIMENSION, compare, paired_differences
from ssdd.fidelity.features import automatic_without_weights, load_networks
from ssdd.fidelity.measure import SetScores
from ssdd.fidelity.pixel_metrics import fine_power, mae, mse, pooled_psnr, psnr, ssim
from ssdd.images.batches import eval_batches, read_split
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import from_uint8, grid, to_uint8
from ssdd.images.sources import open_source
from ssdd.losses import perceptual
from ssdd.model.compared_decoders import Row, open_rows
from ssdd.model.tokenizer import SSDD
from ssdd.tasks.build import encoder_option, foreign_encoder
from ssdd.tasks.noise_agreement import noise_agreement

ORIGINALS, REALS = "originals", "reals"
AGREEMENT_IMAGES = 32
HIGHER_IS_BETTER = ("PSNR", "PSNR_pooled", "SSIM")
log = logging.getLogger(__name__)


class Evaluation:
    """The images, networks and metrics of reconstruction evaluations; made once, run on any rows."""

    def __init__(self, cfg: SSDDConfig, processes: Processes, precision: Precision):
        self.cfg, self.processes, self.precision = cfg, processes, precision
        self.device = processes.device
        held_out = replace(cfg.dataset, limit=cfg.evaluation.limit or cfg.dataset.limit)
        self.dataset = ImageDataset(open_source(held_out, "val"), held_out, train=False)
        features, metrics = list(cfg.evaluation.features), cfg.evaluation.metrics
        self.networks = load_networks([*features, *["inception"] * ("FID" in metrics)], self.device)
        self.perceptual = perceptual.load_metrics(metrics, self.device)
        self.left_out = [f"features {name}" for name in automatic_without_weights(features)]
        self.left_out += perceptual.automatic_without_weights(metrics)
        self._fell_back = False
        if self.left_out and processes.is_main:
            log.warning("skipped (weights not found): %s", ", ".join(self.left_out))

    @torch.no_grad()
    def run(self, rows: Sequence[Row], baselines: bool = False, reals: bool = False) -> dict[str, Any]:
        """Reconstruct the validation images with every row and score them.

        Returns {"count", "rows": [{name, steps, PSNR (mean of the images'), PSNR_pooled (of all their pixels), SSIM,
        MSE (times 1000), MAE, perceptual distances, rFID where Inception is, power_ratio (of frequencies above 1/4
        cycle per pixel, to the originals'), images_per_s, distances: {network: scores}}], "floor": {network: scores},
        "paired": {network: KID differences}, "pictures": name -> uint8 images}. Frechet distances are to the originals
        (rFID); with `reals`, KID, precision and recall are to as many training images, and the floor has what the
        originals themselves score against those.
        """
        scores, values, seconds = SetScores(self.networks), defaultdict(dict), defaultdict(float)
        pictures: dict[str, Tensor] = {}
        decoded, fine = 0, {}
        pca = self._pca(rows[0].tokenizer) if baselines else None
        for x, _, indices in self._batches(self.dataset):
            originals = to_uint8(x)
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
                images[f"PCA-{pca.pca.n_components_}"] = pca.decode(pca.encode(originals.cpu())).to(self.device)
                images["blur"] = slight_blur(originals)
            features = {name: network.features(x) for name, network in self.perceptual.items()}
            fine |= dict(zip(indices.tolist(), fine_power(originals).tolist(), strict=True))
            for name, batch in images.items():
                scores.update(name, batch, indices)
                if name != ORIGINALS:
                    values[name] |= self._image_metrics(batch, originals, features, indices)
                kept = pictures.get(name, batch[:0].cpu())
                pictures[name] = torch.cat([kept, batch[: self.cfg.show_samples - len(kept)].cpu()])
        if reals:
            as_many = replace(self.cfg.dataset, limit=len(self.dataset))
            training = ImageDataset(open_source(as_many, "train"), as_many, train=False)
            for x, _, indices in self._batches(training):
                scores.update(REALS, to_uint8(x), indices)
        means = self._merge(values)
        fine = {i: power for part in self.processes.gather_objects(fine) for i, power in part.items()}
        for row in means.values():
            row["PSNR_pooled"] = pooled_psnr(row["MSE"] / 1000)
            row["power_ratio"] = row.pop("fine_power") / max(sum(fine[i] for i in sorted(fine)) / len(fine), 1e-12)
        result = self._summarise(scores, means, rows, reals)
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
            return wanted, scores[key] if wanted in HIGHER_IS_BETTER else -scores[key]
        if not self._fell_back and self.processes.is_main:
            log.warning("training.save_on_best=%s: %s; PSNR selects the best checkpoint", wanted, reason)
        self._fell_back = True
        return "PSNR", scores["PSNR"]

    def _batches(self, dataset: ImageDataset):
        rank, world = self.processes.rank, self.processes.world
        for x, labels, indices in eval_batches(
            dataset, self.cfg.evaluation.batch_size, rank, world, self.cfg.dataset.reading_processes
        ):
            yield x.to(self.device, memory_format=torch.channels_last), labels, indices

    def _image_metrics(
        self, images: Tensor, originals: Tensor, features: dict[str, Any], indices: Tensor
    ) -> dict[int, dict[str, float]]:
        """Sample index -> metrics of that image, on 8-bit pixels; MSE and MAE in units of [0, 1] times 1000 and 1.

        features: those of the originals, for every perceptual distance.
        """
        columns = {
            "PSNR": psnr(images, originals),
            "SSIM": ssim(images, originals),
            "MSE": 1000 * mse(images, originals),
            "MAE": mae(images, originals),
            "fine_power": fine_power(images),
        }
        for name, network in self.perceptual.items():
            columns[name] = network.distance(network.features(from_uint8(images)), features[name])
        table = {name: column.tolist() for name, column in columns.items()}
        return {index: {name: table[name][i] for name in table} for i, index in enumerate(indices.tolist())}

    def _merge(self, values: dict[str, dict[int, dict[str, float]]]) -> dict[str, dict[str, float]]:
        """Means over all images of all processes, summed in the order of their indices."""
        merged: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
        for part in self.processes.gather_objects(dict(values)):
            for name, rows in part.items():
                merged[name] |= rows
        return {
            name: {key: sum(rows[i][key] for i in sorted(rows)) / len(rows) for key in next(iter(rows.values()))}
            for name, rows in merged.items()
        }

    def _summarise(
        self, scores: SetScores, means: dict[str, dict[str, float]], rows: Sequence[Row], reals: bool
    ) -> dict[str, Any]:
        steps = {row.name: row.steps for row in rows}
        table = [{"name": name, "steps": steps.get(name), **means[name], "distances": {}} for name in means]
        result: dict[str, Any] = {"count": 0, "rows": table, "floor": {}, "paired": {}, "features": {}}
        for network, sets in scores.compute().items():
            resamples, seed = self.cfg.evaluation.resamples, self.cfg.seed
            names = [*means, ORIGINALS] if reals else list(means)
            compared, kernels = compare(sets, names, ORIGINALS, REALS if reals else None, resamples, seed)
            for row in table:
                row["distances"][network] = compared[row["name"]]
                if network == "inception":
                    row["rFID"] = compared[row["name"]]["frechet"]
            if not reals:
                continue
            frechet = compare(sets, [ORIGINALS], REALS, None, resamples, seed)[0][ORIGINALS]
            result["floor"][network] = compared[ORIGINALS] | frechet
            result["paired"][network] = paired_differences(kernels, list(means))
        result["features"] = {network.name: network.checksum for network in self.networks}
        result["left_out"] = self.left_out
        skipped = {
            i: where for part in self.processes.gather_objects(self.dataset.corrupt) for i, where in part.items()
        }
        result["skipped"] = [skipped[i] for i in sorted(skipped)]
        result["count"] = len(self.dataset) - len(skipped)
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
    """Evaluate `evaluation.decoders`, or `ssdd.checkpoint` at `evaluation.steps`; writes task_result.json, pictures."""
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
    evaluation = Evaluation(cfg, processes, precision)
    result = evaluation.run(rows, baselines=cfg.evaluation.baselines, reals=True)
    if cfg.evaluation.noise_draws:
        count = min(AGREEMENT_IMAGES, len(evaluation.dataset))
        x = from_uint8(torch.stack([evaluation.dataset[i][0] for i in range(count)])).to(processes.device)
        for row, scores in zip(rows, result["rows"], strict=False):
            with precision.autocast():
                draws, parts = cfg.evaluation.noise_draws, x.split(cfg.evaluation.batch_size)
                scores["noise_r2"] = noise_agreement(row, rows[0], parts, draws, cfg.seed)
    pictures = result.pop("pictures")
    directory = RunDirectory(cfg.ckpt_dir, cfg.run_name)
    if processes.is_main:
        directory.save_config(cfg)
        for name, images in pictures.items() if cfg.show_samples else ():
            save_png(directory.pictures / f"{name}.png", grid(images, columns=len(images)))
        result = {
            "task": "eval",
            "data": evaluation.dataset.source.fingerprint(),
            "crop": cfg.dataset.crop,
            "peak_memory_bytes": peak_memory(processes.device),
            "precision": precision.record(),
            "measured": measured_by(processes.device),
            "decoders": {row.name: row.provenance() for row in rows},
            **result,
        }
        directory.write_result(result)
    return result
