"""Statistics of a set of images as safetensors files, with their provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ssdd.engine.checkpoint import load_tensors, save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.user_cache import cache_folder
from ssdd.fidelity.moments import Statistics

FORMAT = "ssdd fidelity statistics 1"


def default_cache() -> Path:
    """Where statistics of references are kept unless a caller says otherwise."""
    return cache_folder() / "fidelity"


def save_statistics(path: str | Path, statistics: Statistics, provenance: dict[str, Any]) -> None:
    """Write statistics and where they come from; whole or not at all."""
    tensors = {"mean": statistics.mean, "cov": statistics.cov}
    if statistics.features is not None:
        tensors["features"] = statistics.features
    if statistics.spatial is not None:
        tensors |= {"spatial_mean": statistics.spatial.mean, "spatial_cov": statistics.spatial.cov}
    described = {"count": statistics.count, "inception_score": statistics.inception_score, "provenance": provenance}
    save_tensors(path, tensors, {"format": FORMAT, "statistics": json.dumps(described, sort_keys=True)})


def load_statistics(path: str | Path) -> tuple[Statistics, dict[str, Any]]:
    """Statistics and provenance as given to `save_statistics`; UserError when the file is of another kind."""
    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{path} is not a complete safetensors file: {problem}") from problem
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} holds no statistics: its format is {metadata.get('format')!r}, expected {FORMAT!r}")
    tensors, described = load_tensors(path), json.loads(metadata["statistics"])
    count, score = described["count"], described["inception_score"]
    spatial = None
    if "spatial_mean" in tensors:
        spatial = Statistics(count, tensors["spatial_mean"], tensors["spatial_cov"])
    statistics = Statistics(
        count, tensors["mean"], tensors["cov"], tensors.get("features"), spatial, tuple(score) if score else None
    )
    return statistics, described["provenance"]
