"""Task `evaluate`: every decoder decodes the same drawn latents; distances to the real training images (gFID and kin).

Decoder noise comes from one generator per sample index, so that figures depend on neither batch size nor processes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dit.config import DiTConfig
from ssdd.baselines import PixelPCA, classwise_gaussian_samples
from ssdd.decoders import Row, open_rows
from ssdd.engine.checkpoint import load_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.fidelity import copy_rate
from ssdd.engine.files import read_json, write_json
from ssdd.engine.images import DatasetConfig, ImageDataset, eval_batches, open_source, read_split
from ssdd.engine.noise import indexed_noise
from ssdd.engine.pictures import grid, save_png, to_uint8
from ssdd.engine.run import RunDirectory
from ssdd.engine.scores import SetScores, compare, load_networks, paired_differences
from ssdd.engine.training import open_accelerator, peak_memory, synchronize
from ssdd.latent import LatentNorm

REFERENCE, HELD_OUT = "training images", "held-out images"
SHOWN_A_CLASS = 8


class ClassJudge:
    """A support vector classifier of pixels (RBF kernel), fitted to real training images."""

    def __init__(self, images: Tensor, labels: Tensor):
        from sklearn.svm import SVC

        if len(labels.unique()) < 2:
            raise UserError("evaluation.class_accuracy needs a data set of two classes or more; set it to false")
        self.model = SVC(C=10, gamma="scale").fit(self._pixels(images), labels.numpy())

    def correct(self, images: Tensor, labels: Tensor) -> list[bool]:
        """Whether each image (uint8 [n, 3, H, W]) is seen as its label."""
        return (self.model.predict(self._pixels(images)) == labels.cpu().numpy()).tolist()

    @staticmethod
    def _pixels(images: Tensor) -> np.ndarray:
        return images.float().mean(dim=1).flatten(1).cpu().numpy() / 255


def run(cfg: DiTConfig) -> dict[str, Any]:
    """Evaluate the sample set `samples` with `evaluation.decoders`; returns what it writes to task_result.json.

    UserError when the latents do not belong to a decoder's encoder, or nothing is given to decode.
    """
    if cfg.samples is None or not cfg.evaluation.decoders:
        raise UserError("task=evaluate needs samples=DIR and evaluation.decoders=[name:reference:steps, ...]")
    accelerator = open_accelerator("no", deterministic=False)
    device = accelerator.device
    folder = Path(cfg.samples)
    description = read_json(folder / "sample_set.json")
    latents = load_tensors(folder / "latents.safetensors")
    z_n, labels = latents["z_n"], latents["labels"]
    rows = open_rows(cfg.evaluation.decoders, cfg.ckpt_dir, device)
    norms = {row.name: LatentNorm.load(folder / "z_stats.json", row.tokenizer.encoder_fingerprint()) for row in rows}
    _check_sizes(rows, z_n, cfg.dataset.im_size)
    source = open_source(cfg.dataset, "train")

    scores = SetScores(load_networks(cfg.evaluation.features, device))
    keep = cfg.evaluation.class_accuracy or cfg.evaluation.baseline_numbers is not None
    training = read_split(cfg.dataset, "train")[:2] if keep else None
    _collect(scores, REFERENCE, "train", cfg.dataset, accelerator)
    limit = min(len(z_n), cfg.dataset.limit or len(z_n))  # the floor of a distance is that of as many real images
    _collect(scores, HELD_OUT, "val", replace(cfg.dataset, limit=limit), accelerator)
    judge = ClassJudge(*training) if cfg.evaluation.class_accuracy else None
    correct: dict[str, list[bool]] = defaultdict(list)

    # Decode the same latents with every decoder.
    seconds: dict[str, float] = defaultdict(float)
    shown: dict[str, dict[int, Tensor]] = defaultdict(dict)
    own = torch.arange(accelerator.process_index, len(z_n), accelerator.num_processes)
    columns = min(SHOWN_A_CLASS, int(labels.unique(return_counts=True)[1].min()))
    per_class = _first_of_each_class(labels, columns)
    for indices in own.split(cfg.evaluation.batch_size) if len(own) else ():
        pixels: dict[str, Tensor] = {}
        for row in rows:
            z = norms[row.name].denormalise(z_n[indices].to(device))
            shape = (3, z.shape[-2] * row.tokenizer.f, z.shape[-1] * row.tokenizer.f)
            noise = indexed_noise(indices, shape, cfg.sampling.seed, "decoder").to(device)
            if row.name not in seconds:
                row.tokenizer.decode(z, steps=row.steps, noise=noise)  # not timed: first calls choose kernels
            synchronize(device)
            began = time.perf_counter()
            pixels[row.name] = to_uint8(row.tokenizer.decode(z, steps=row.steps, noise=noise))
            synchronize(device)
            seconds[row.name] += time.perf_counter() - began
        for name, images in pixels.items():
            scores.update(name, images, indices)
            if judge is not None:
                correct[name] += judge.correct(images, labels[indices])
            wanted = zip(indices.tolist(), images.cpu(), strict=True)
            shown[name] |= {i: image for i, image in wanted if i in per_class}

    # Trivial baseline: one Gaussian a class in pixel PCA space, as many samples of the same classes.
    names = [row.name for row in rows]
    if cfg.evaluation.baseline_numbers is not None:
        pca = PixelPCA(training[0], cfg.evaluation.baseline_numbers)
        images = classwise_gaussian_samples(pca, *training, labels, cfg.sampling.seed)[own]
        names.append("PCA-Gaussian")
        for part in torch.arange(len(own)).split(cfg.evaluation.batch_size):
            scores.update("PCA-Gaussian", images[part].to(device), own[part])
            if judge is not None:
                correct["PCA-Gaussian"] += judge.correct(images[part], labels[own[part]])

    result: dict[str, Any] = {
        "task": "evaluate",
        "count": len(z_n),
        "samples": description,
        "reference": {"source": source.name, "fingerprint": source.fingerprint(), "crop": cfg.dataset.crop},
        "rows": [{"name": name, "distances": {}} for name in names],
        "floor": {},
        "paired": {},
        "features": {network.name: network.checksum for network in scores.networks},
    }
    steps = {row.name: row.steps for row in rows}
    for network, sets in scores.compute().items():
        resamples, seed = cfg.evaluation.resamples, cfg.sampling.seed
        compared, kernels = compare(sets, [*names, HELD_OUT], REFERENCE, REFERENCE, resamples, seed)
        result["floor"][network] = {**compared[HELD_OUT], "count": sets[HELD_OUT].count}
        result["paired"][network] = paired_differences(kernels, names)
        for row in result["rows"]:
            train, val = sets[REFERENCE].features, sets[HELD_OUT].features
            copies, chance = copy_rate(sets[row["name"]].features, train, val)
            row["distances"][network] = {**compared[row["name"]], "copy_rate": copies, "copy_rate_held_out": chance}
    correct = {name: sum(gather_object([correct[name]]), []) for name in names}
    for row in result["rows"]:
        row["steps"] = steps.get(row["name"])
        if judge is not None:
            row["class_accuracy"] = sum(correct[row["name"]]) / len(correct[row["name"]])
        if row["name"] in seconds:
            row["images_per_s"] = len(own) / seconds[row["name"]] * accelerator.num_processes
    if judge is not None:
        real = judge.correct(*read_split(cfg.dataset, "val")[:2])
        result["class_accuracy_held_out"] = sum(real) / len(real)
    result["peak_memory_bytes"] = peak_memory(device)
    pictures: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for part in gather_object([dict(shown)]):
        for name, images in part.items():
            pictures[name] |= images
    if accelerator.is_main_process:
        out = Path(cfg.out) if cfg.out else RunDirectory(cfg.ckpt_dir, cfg.run_name).path / "evaluation"
        for name, images in pictures.items():
            ordered = torch.stack([images[i] for i in per_class])
            save_png(out / "pictures" / f"{name}.png", grid(ordered, columns=columns))
        write_json(out / "task_result.json", result)
    accelerator.wait_for_everyone()
    return result


def _collect(scores: SetScores, name: str, split: str, cfg: DatasetConfig, accelerator: Accelerator) -> None:
    """Add the real images of a split to the scores."""
    dataset = ImageDataset(open_source(cfg, split), cfg, train=False)
    rank, world = accelerator.process_index, accelerator.num_processes
    for x, _, indices in eval_batches(dataset, 256, rank, world, cfg.workers):
        scores.update(name, to_uint8(x).to(accelerator.device), indices)


def _first_of_each_class(labels: Tensor, count: int) -> list[int]:
    """Indices of the first `count` samples of every class, class after class."""
    return [i for label in labels.unique().tolist() for i in torch.nonzero(labels == label).flatten()[:count].tolist()]


def _check_sizes(rows: list[Row], z_n: Tensor, im_size: int) -> None:
    for row in rows:
        side = z_n.shape[-1] * row.tokenizer.f
        if side != im_size or row.tokenizer.z_dim != z_n.shape[1]:
            raise UserError(
                f"decoder {row.name} makes images of {side} px from latents {tuple(z_n.shape[1:])}, the reference "
                f"has dataset.im_size={im_size}: give the size that the latents were cached at"
            )
