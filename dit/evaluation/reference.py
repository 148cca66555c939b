"""What generated images are compared with: the training images of a data set, or a reference made elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit.config import DiTConfig, DiTEvaluationConfig
from ssdd.engine.errors import UserError
from ssdd.engine.processes import Processes
from ssdd.fidelity.features import FeatureNetwork
from ssdd.fidelity.measure import default_cache, measure_once
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.set_to_measure import SetToMeasure
from ssdd.fidelity.stored_sets import SplitImages, Treatment, check_comparable


def open_reference(cfg: DiTConfig, networks: Sequence[FeatureNetwork]) -> SetToMeasure | SplitImages:
    """`evaluation.reference`, or the training images. UserError when it is a file of another network's statistics."""
    if not cfg.evaluation.reference:
        return SplitImages(cfg.dataset, "train")
    reference = SetToMeasure(cfg.evaluation.reference, cfg.dataset.im_size, cfg.dataset.crop)
    for network in networks:
        reference.check_network(network)
    return reference


def measured(
    images: SetToMeasure | SplitImages,
    networks: Sequence[FeatureNetwork],
    processes: Processes,
    cfg: DiTEvaluationConfig,
) -> dict[str, Statistics]:
    """Network name -> statistics of real images, in the main process; for all processes together."""
    cache = Path(cfg.cache) if cfg.cache else default_cache()
    if isinstance(images, SetToMeasure):
        return images.statistics(networks, processes, cache, cfg.batch_size)
    return measure_once(images, networks, processes, cache, kept=cfg.kept_features)


def described(images: SetToMeasure | SplitImages, kept: int) -> dict[str, Any]:
    """What a result records of real images, of which the features of `kept` at most are kept."""
    if isinstance(images, SplitImages):
        return {**images.describe(), "kept_features": min(kept, len(images))}
    treatment = {"crop": images.treatment.crop, "size": images.treatment.size}
    return {"source": str(images.path), "fingerprint": None, **images.describe(), **treatment}


def check_treatment(cfg: DiTConfig, made_of: dict | None, reference: SetToMeasure | SplitImages) -> str | None:
    """How samples and reference differ in crop or size, or None; UserError unless evaluation.allow_mismatch.

    made_of: what the cache of the generator records of its images; foreign files record nothing.
    """
    samples = Treatment((made_of or {}).get("crop") or "unknown", (cfg.dataset.im_size,) * 2)
    problem = check_comparable(samples, reference.treatment, ("samples", "reference"), allow_mismatch=True)
    if problem and not cfg.evaluation.allow_mismatch:
        raise UserError(
            f"{problem}: a distance between them is not comparable with published ones. Take the reference with the "
            "crop of the cache (dataset.crop), or set evaluation.allow_mismatch=true"
        )
    return problem
