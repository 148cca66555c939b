"""Compare sets of images: `python scripts/fidelity.py SAMPLES [MORE ...] REFERENCE features=inception`.

A set is a folder of image files or of WebDataset shards, an npz with uint8 `arr_0`, ADM's reference npz, or a file of
statistics; the last one is the reference. Its statistics are measured once and kept. Everything that moves a figure is
in the result: networks, weights, resize, crop, counts of files by format and size.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import indent
from typing import Any

import torch

from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.files import write_json
from ssdd.engine.processes import Processes
from ssdd.engine.program import named_paths, run_program
from ssdd.engine.tables import listed
from ssdd.fidelity.features import FeatureNetwork, load_networks
from ssdd.fidelity.kid import KernelEstimate, kernel_distance_of_subsets
from ssdd.fidelity.measure import default_cache
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.set_metrics import (
    IMAGES_A_DIMENSION,
    SET_METRICS,
    compare,
    few_images,
    frechet_floor,
    paired_differences,
)
from ssdd.fidelity.set_to_measure import SetToMeasure
from ssdd.fidelity.stored_sets import check_comparable
from ssdd.images.crops import CROPS


@dataclass
class FidelityConfig:
    """Sets of images against a reference set."""

    sets: list[str] = field(default_factory=list)
    """The sets, the reference last; the same as giving them without a key."""
    features: str = "auto"
    """Networks, separated by commas: inception, efficientnet_lite0, dinov2, clip, timm/MODEL; auto: those whose weights
    are found."""
    out: str = "metrics.json"
    """File of the result."""
    im_size: int | None = None
    """Cut all images to squares of this side with `crop`; null leaves them as they are."""
    crop: str = field(default="adm", metadata={"choices": CROPS})
    """adm (box halving, bicubic; every gFID reference's) or resize (bilinear short side, centre crop)."""
    allow_mismatch: bool = False
    """Compare sets even if their sizes or crops differ, and record it in the result."""
    decide: str = field(default="none", metadata={"choices": ("none", "kid", "frechet")})
    """Decide which of several sets is closer to the reference; frechet is accepted only with enough images to make its
    bias small."""
    batch_size: int = 64
    """Images per forward pass."""
    resamples: int = 200
    """Bootstrap resamples of images for KID's interval."""
    kid_subsets: int = 100
    """Random subsets of torch-fidelity's KID estimate."""
    kid_subset_size: int = 1000
    """Images per subset; the estimate is omitted for smaller sets."""
    seed: int = 2020
    """Seed of the subsets and the bootstrap; torch-fidelity uses 2020."""
    cache: str = field(default_factory=lambda: str(default_cache()))
    """Folder for the reference's statistics; empty disables storing them."""


def main(argv: list[str] | None = None) -> int:
    """Compare, print a table, write the result. 2 for an error that the user can mend."""
    return run_program(_run, argv)


def _run(argv: list[str]) -> None:
    paths, keys = named_paths(argv)
    cfg = parse(FidelityConfig, keys, program="fidelity", description=__doc__ or "")
    cfg = replace(cfg, sets=cfg.sets + paths)
    result = run(cfg)
    print(table(result))
    write_json(cfg.out, result)
    print(f"written to {cfg.out}")


def run(cfg: FidelityConfig) -> dict[str, Any]:
    """Measure every set once per network and compare it with the last one; returns what goes to `out`."""
    if len(cfg.sets) < 2:
        raise UserError("give two sets or more, the reference last: python scripts/fidelity.py SAMPLES REFERENCE")
    if len(set(cfg.sets)) < len(cfg.sets):
        raise UserError("a set is named twice; identical sets have distance 0")
    if cfg.decide != "none" and len(cfg.sets) < 3:
        raise UserError(f"decide={cfg.decide} needs two sets of samples and a reference")
    opened = {path: SetToMeasure(path, cfg.im_size, cfg.crop) for path in cfg.sets}
    *names, reference = cfg.sets
    notes = []
    for name in names:
        pair = (opened[name].treatment, opened[reference].treatment)
        notes.append(check_comparable(*pair, (name, reference), cfg.allow_mismatch))
    alone = Processes(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    networks = load_networks(cfg.features.split(","), alone.device)
    if not networks:
        raise UserError("no weights of a feature network were found; name a network to see how to fetch them")
    for images in opened.values():
        for network in networks:
            images.check_network(network)
    check_decision(cfg.decide, [opened[name].count for name in names], networks)
    result: dict[str, Any] = {
        "reference": opened[reference].describe(),
        "sets": {name: opened[name].describe() for name in names},
        "networks": {network.name: network.provenance() for network in networks},
        "metrics": {},
        "notes": [note for note in notes if note],
    }
    cache = {reference: Path(cfg.cache)} if cfg.cache else {}
    measured = {
        name: images.statistics(networks, alone, cache.get(name), cfg.batch_size) for name, images in opened.items()
    }
    for network in networks:
        sets = {name: of_networks[network.name] for name, of_networks in measured.items()}
        scores, kernels = compare(sets, names, reference, reference, cfg.resamples, cfg.seed)
        for name in names:
            scores[name] |= _beside(cfg, sets[name], sets[reference])
            if floor := scores[name].get("frechet_floor"):
                scores[name]["frechet_ratio"] = scores[name]["frechet"] / floor
        result["metrics"][network.name] = scores
        for name in names:
            result["notes"] += few_images(f"{name}: {sets[name].count} images", sets[name].count, network)
        if cfg.decide != "none":
            result.setdefault("decision", {})[network.name] = decide(cfg.decide, names, scores, kernels)
    return result


def _beside(cfg: FidelityConfig, samples: Statistics, reference: Statistics) -> dict[str, Any]:
    """Counts, the real-against-real floor, KID over torch-fidelity's random subsets."""
    both = [part.features for part in (samples, reference) if part.features is not None]
    found: dict[str, Any] = {
        "counts": [samples.count, reference.count],
        "images_a_dimension": samples.count and samples.count / len(samples.mean),
    }
    floor = frechet_floor(reference, samples.count) if samples.count else None
    if floor is not None:
        value, counts = floor
        found |= {"frechet_floor": value, "frechet_floor_counts": list(counts)}
    if len(both) == 2 and min(len(part) for part in both) >= cfg.kid_subset_size:
        mean, deviation = kernel_distance_of_subsets(*both, cfg.kid_subsets, cfg.kid_subset_size, cfg.seed)
        found |= {"kid_of_subsets": mean, "kid_of_subsets_deviation": deviation}
    return found


def check_decision(by: str, counts: list[int | None], networks: list[FeatureNetwork]) -> None:
    """UserError when raw Frechet distances of sets of these `counts` must not decide anything."""
    needed = max(IMAGES_A_DIMENSION * network.dim for network in networks)
    if by == "frechet" and (None in counts or len(set(counts)) > 1 or min(counts) < needed):
        raise UserError(
            f"decide=frechet: raw Frechet distances of {', '.join(str(count) for count in counts)} images decide "
            f"nothing: their bias does. That takes equal counts of at least {needed} ({IMAGES_A_DIMENSION} per "
            "dimension). Use decide=kid"
        )


def decide(
    by: str, names: list[str], scores: dict[str, dict[str, Any]], kernels: dict[str, KernelEstimate]
) -> dict[str, Any]:
    """Which set is closest; by KID every difference comes with a 95 % interval, and may leave it open (None).

    UserError by KID when only statistics of a set are there.
    """
    if by == "frechet":
        return {"by": by, "closest": min(names, key=lambda name: scores[name]["frechet"])}
    if len(kernels) < len(names):
        raise UserError("decide=kid needs the images of every set, not only statistics")
    differences = paired_differences(kernels, names)
    closest = min(names, key=lambda name: scores[name]["kid"])
    pairs = [pair for other in names for pair in (f"{closest} - {other}", f"{other} - {closest}")]
    own = [differences[pair] for pair in pairs if pair in differences]
    sure = not any(difference["low"] <= 0 <= difference["high"] for difference in own)
    return {"by": by, "closest": closest if sure else None, "differences": differences}


def table(result: dict[str, Any]) -> str:
    """How each set was treated, then a block of lines per network and set."""
    lines = []
    for name, described in (*result["sets"].items(), ("reference", result["reference"])):
        lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in described.items() if key != "path"))
    for network, scores in result["metrics"].items():
        labels = {key: metric.title(network) for key, metric in SET_METRICS.items() if metric.label}
        for name, row in scores.items():
            lines.append(f"\n{name}, {network} (weights {result['networks'][network]['checksum'][:8]}):")
            figures = {
                f"{labels.get(key, key.replace('_', ' '))}:": f"{value:.6g}" if isinstance(value, float) else str(value)
                for key, value in row.items()
            }
            lines.append(indent(listed(figures), "  "))
    for network, decision in result.get("decision", {}).items():
        lines.append(
            f"\nclosest by {decision['by']} on {network}: {decision['closest'] or 'left open by the interval'}"
        )
    lines += [f"\nnote: {note}" for note in result["notes"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
