"""Task `evaluate`: every decoder decodes the same drawn latents; distances to real images (gFID and its kin).

First all processes make and measure image sets, each in a folder of `measured` that survives a kill; then the main
process alone compares them. A decoder that was measured before is not run again, nor are latents drawn twice.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.config import DiTConfig, DiTEvaluationConfig
from dit.evaluation.generation_gap import KERNEL, Gap
from dit.evaluation.latent_sets import SampleSet, decoded, generator_of, images_behind, open_samples
from dit.evaluation.measured_sets import Export, ImageSetFolder, MadeImages, Measuring, Recipe
from dit.evaluation.reference import check_treatment, described, measured, open_reference
from dit.evaluation.sweep import Sweep
from dit.evaluation.tables import table
from ssdd.engine.devices import choose_kernels, peak_memory
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file, sha256_json, write_json
from ssdd.engine.png import save_png
from ssdd.engine.precision import Precision
from ssdd.engine.processes import Processes
from ssdd.engine.provenance import measured_by
from ssdd.engine.run import RunDirectory
from ssdd.fidelity.baselines import PixelPCA, classwise_gaussian_samples
from ssdd.fidelity.features import automatic_without_weights, load_networks
from ssdd.fidelity.judge import SmallClassifier
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.neighbours import copy_rate
from ssdd.fidelity.set_metrics import compare, few_images, paired_differences
from ssdd.fidelity.stored_sets import SplitImages
from ssdd.images.batches import eval_batches, read_split
from ssdd.images.dataset import ImageDataset
from ssdd.images.pixels import ROUNDING, grid
from ssdd.images.sources import open_source
from ssdd.model.compared_decoders import Row, open_rows

REFERENCE, HELD_OUT = "training images", "held-out images"
BASELINE = "PCA-Gaussian"
SHOWN_CLASSES, SHOWN_A_CLASS = 20, 8
KEPT_SAMPLES = 50_000  # generated images whose features are kept: ADM's precision and recall take all of its 50 000


def run(cfg: DiTConfig) -> dict[str, Any]:
    """Evaluate with `evaluation.decoders`; returns what it writes to task_result.json, {} but in the main process.

    UserError when the latents do not belong to a decoder's encoder, or nothing is given to decode.
    """
    options = cfg.evaluation
    if not options.decoders:
        raise UserError(
            "task=evaluate needs evaluation.decoders=[name:reference:steps, ...]; samples=DIR is the sample set, "
            "without it the generator of run_name or sampling.checkpoint draws one"
        )
    _check(options)
    if options.sweep_cfg or options.sweep_steps:
        generator_of(cfg)  # a sweep draws, even if a sample set is given
    processes = Processes.join()
    device = processes.device
    precision = Precision.resolve(options.mixed_precision, device, measuring=True)
    choose_kernels(tf32=False)
    rows = open_rows(options.decoders, cfg.ckpt_dir, device)
    networks = load_networks(options.features, device)
    judge = SmallClassifier.load(options.classifier).to(device) if options.classifier else None
    if options.features and not networks:
        raise UserError("no weights of a feature network were found; name one in evaluation.features")
    out = Path(cfg.out) if cfg.out else RunDirectory(cfg.ckpt_dir, cfg.run_name).path / "evaluation"
    of_real = Measuring(networks, processes, precision, options.batch_size, options.kept_features)
    of_samples = replace(of_real, kept=max(options.kept_features, KEPT_SAMPLES), judge=judge)
    reference = open_reference(cfg, networks)

    mismatch = check_treatment(cfg, images_behind(cfg), reference)
    samples = open_samples(cfg, rows)
    if judge:
        _check_classes(judge, samples, options.classifier)
    norms = {row.name: samples.norm(row) for row in rows}
    held_out = None
    if options.held_out:  # the floor of a distance is that of as many real images
        as_many = replace(cfg.dataset, limit=min(len(samples), cfg.dataset.limit or len(samples)))
        held_out = SplitImages(as_many, "val")

    # All processes: make and measure the sets.
    of_reference = measured(reference, networks, processes, options)
    of_held_out = measured(held_out, networks, processes, options) if held_out else {}
    judged = {"judge": sha256_file(Path(options.classifier)) if judge else None}
    shown = _first_of_each_class(samples.labels)
    recipes = {row.name: decoded(row, norms[row.name], samples, cfg.sampling.seed, precision) for row in rows}
    if options.baseline_numbers is not None:
        recipes[BASELINE] = _baseline(cfg, samples)
    sets: dict[str, ImageSetFolder] = {}
    for name, recipe in recipes.items():
        recipe = recipe._replace(request=recipe.request | judged)
        seen = (sum(shown, []), _export(options, out / "export", name)) if name != BASELINE else ()
        sets[name] = ImageSetFolder(out / "measured" / "samples" / name, recipe, of_samples, samples.labels, *seen)
    for image_set in sets.values():
        image_set.measure()
    gap = Gap(cfg, out, rows, norms, held_out, of_real) if held_out and (options.gap or options.latent_noise) else None
    if gap:
        gap.measure()
    sweep = Sweep(cfg, out, rows, of_real) if options.sweep_cfg or options.sweep_steps else None
    if sweep:
        sweep.measure()
    if not processes.is_main:
        return {}

    # The main process: compare them, network by network.
    result: dict[str, Any] = {
        "task": "evaluate",
        "count": len(samples),
        "precision": precision.record(),
        "measured": measured_by(device),
        "samples": samples.description,
        "labels": samples.label_scheme(),
        "reference": described(reference, options.kept_features),
        "held_out": described(held_out, options.kept_features) if held_out else None,
        "rounding": ROUNDING,
        "decoders": {row.name: row.provenance() for row in rows},
        "features": {network.name: network.checksum for network in networks},
        "networks": {network.name: network.provenance() for network in networks},
        "left_out": [f"features {name}" for name in automatic_without_weights(options.features)],
        "notes": [note for note in (mismatch, _smaller_floor(held_out, len(samples))) if note],
        "shown": [{"label": int(samples.labels[line[0]]), "indices": line} for line in shown],
        "rows": [{"name": name, "distances": {}} for name in sets],
        "floor": {},
        "paired": {},
    }
    for image_set in sets.values():
        image_set.finish()
    _speed(result["rows"], sets, rows, samples)
    for network in networks:
        statistics = {name: image_set.statistics(network) for name, image_set in sets.items()}
        real = {REFERENCE: of_reference[network.name]}
        if held_out:
            real[HELD_OUT] = of_held_out[network.name]
        _compare(result, network.name, statistics, real, cfg, has_training=options.reference is None)
        result["notes"] += few_images(f"{len(samples)} samples", len(samples), network)
    if judge is not None:
        result["class_accuracy_held_out"] = _accuracy_of_real(judge, SplitImages(cfg.dataset, "val").dataset, options)
    if gap:
        result |= gap.compare(of_reference, of_held_out, result["rows"])
    if sweep:
        result["sweep"] = sweep.compare(of_reference)
    result["peak_memory_bytes"] = peak_memory(device)
    for row in rows:
        images = sets[row.name].pictures()
        ordered = torch.stack([images[i] for of_class in shown for i in of_class])
        save_png(out / "pictures" / f"{row.name}.png", grid(ordered, columns=len(shown[0])))
    write_json(out / "task_result.json", result)
    print(f"{table(result)}\nwritten to {out / 'task_result.json'}", flush=True)
    return result


def _check(options: DiTEvaluationConfig) -> None:
    """UserError for invalid numbers, before anything is loaded."""
    if min(options.kept_features, options.sweep_n, options.resamples) < 2 or options.batch_size < 1:
        raise UserError(
            "evaluation.kept_features, sweep_n and resamples must be at least 2, evaluation.batch_size at least 1"
        )
    if any(level < 0 for level in options.latent_noise):
        raise UserError(f"evaluation.latent_noise={options.latent_noise}: standard deviations must not be negative")
    if options.latent_noise and not options.held_out:
        raise UserError("evaluation.latent_noise reconstructs held-out images: it needs evaluation.held_out=true")


def _accuracy_of_real(judge: SmallClassifier, images: ImageDataset, options: DiTEvaluationConfig) -> float:
    """Share of the images whose class the judge finds, a batch at a time."""
    batches = eval_batches(images, options.batch_size, workers=images.cfg.reading_processes)
    return torch.cat([judge.correct(pixels, labels) for pixels, labels, _ in batches]).double().mean().item()


def _check_classes(classifier: SmallClassifier, samples: SampleSet, path: str) -> None:
    """UserError if the classifier does not know all classes of the samples."""
    if (largest := int(samples.labels.max())) >= classifier.num_classes:
        raise UserError(
            f"evaluation.classifier={path} was trained on classes 0 to {classifier.num_classes - 1}, samples have "
            f"label {largest}: train one on their data set (ssdd/main.py task=classifier)"
        )


def _export(options: DiTEvaluationConfig, folder: Path, name: str) -> Export | None:
    if not (options.npz or options.png):
        return None
    return Export(folder / f"{name}.npz" if options.npz else None, folder / name if options.png else None)


def _baseline(cfg: DiTConfig, samples: SampleSet) -> Recipe:
    """Trivial baseline: one Gaussian per class in pixel PCA space, as many samples of the same classes."""
    numbers, seed = cfg.evaluation.baseline_numbers, cfg.sampling.seed
    drawn: list[Tensor] = []

    def make(indices: range) -> MadeImages:
        began = time.perf_counter()
        if not drawn:
            images, labels, _ = read_split(cfg.dataset, "train")
            drawn.append(classwise_gaussian_samples(PixelPCA(images, numbers), images, labels, samples.labels, seed))
        own = drawn[0][indices.start : indices.stop]
        return MadeImages(own, torch.tensor(indices), time.perf_counter() - began)

    request = {
        "baseline": numbers,
        "seed": seed,
        "training": open_source(cfg.dataset, "train").fingerprint(),
        "crop": cfg.dataset.crop,
        "size": cfg.dataset.im_size,
        "labels": sha256_json(samples.labels),
    }
    return Recipe(len(samples), request, make)


def _speed(table_rows: list[dict], sets: dict[str, ImageSetFolder], rows: list[Row], samples: SampleSet) -> None:
    """Steps, class accuracy, and the cost per image of drawing and decoding."""
    steps = {row.name: row.steps for row in rows}
    drawing = samples.samples_per_s()
    for row in table_rows:
        figures = sets[row["name"]].figures()
        row["steps"] = steps.get(row["name"])
        if figures["class_accuracy"] is not None:
            row["class_accuracy"] = figures["class_accuracy"]
        if row["steps"] is None:
            continue
        row["images_per_s"] = figures["images_per_s"]
        if drawing is not None:
            decoding_s, total_s = 1 / row["images_per_s"], 1 / row["images_per_s"] + 1 / drawing
            row |= {"sampling_images_per_s": 1 / total_s, "decoder_share": decoding_s / total_s}


def _compare(
    result: dict[str, Any],
    network: str,
    sets: dict[str, Statistics],
    real: dict[str, Statistics],
    cfg: DiTConfig,
    has_training: bool,
) -> None:
    """Distances, floor and paired differences on one network, into the result."""
    resamples, seed = cfg.evaluation.resamples, cfg.sampling.seed
    names, others = list(sets), [name for name in real if name != REFERENCE]
    compared, kernels = compare(sets | real, [*names, *others], REFERENCE, REFERENCE, resamples, seed)
    if kernels:
        result["paired"][network] = paired_differences(kernels, names)
    floor = compared.get(HELD_OUT)
    to_held_out: dict[str, dict[str, float]] = {}
    if floor:
        result["floor"][network] = {**floor, "count": real[HELD_OUT].count}
        # A generator that copies its training images is closer to them than to others.
        to_held_out = compare(sets | real, names, HELD_OUT, HELD_OUT, resamples, seed, slow=False)[0]
    for row in result["rows"]:
        scores = row["distances"][network] = compared[row["name"]]
        own = to_held_out.get(row["name"], {})
        scores |= {f"{key}_to_held_out": own[key] for key in ("frechet", *KERNEL) if key in own}
        if floor:
            scores["frechet_ratio"] = scores["frechet"] / floor["frechet"] if floor["frechet"] > 0 else None
        if floor and has_training:
            features = (sets[row["name"]], real[REFERENCE], real[HELD_OUT])
            copies, chance = copy_rate(*(statistics.features for statistics in features))
            scores |= {"copy_rate": copies, "copy_rate_held_out": chance}
            scores["copy_rate_training_images"] = len(real[REFERENCE].features)


def _smaller_floor(held_out: SplitImages | None, count: int) -> str | None:
    if held_out is None or len(held_out) >= count:
        return None
    return (
        f"the floor is that of {len(held_out)} held-out images: its Frechet distances have more "
        f"bias than those of {count} samples, and ratios to it are too favourable"
    )


def _first_of_each_class(labels: Tensor) -> list[list[int]]:
    """Indices of the first samples of every shown class, equally many; the classes are spread over all there are."""
    classes, counts = labels.unique(return_counts=True)
    chosen = [i * len(classes) // SHOWN_CLASSES for i in range(SHOWN_CLASSES)]
    chosen = chosen if len(classes) > SHOWN_CLASSES else list(range(len(classes)))
    columns = min(SHOWN_A_CLASS, int(counts[chosen].min()))
    return [torch.nonzero(labels == classes[i]).flatten()[:columns].tolist() for i in chosen]
