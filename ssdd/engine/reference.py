"""Statistics of a set of images for one feature network: measured once, kept as safetensors with their provenance.

Also read: ADM's npz (`mu`, `sigma`, `mu_s`, `sigma_s`, and `arr_0` with the images of precision and recall), npz with
`mu` and `sigma` of other evaluators, and the files of torch-fidelity's cache. Nothing in a foreign file is executed.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssdd.engine.checkpoint import load_tensors, save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.features import FeatureNetwork
from ssdd.engine.fidelity import Statistics
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import sha256_file, sha256_json
from ssdd.engine.image_sets import NPZ_IMAGES, ImageSet, Treatment, open_set
from ssdd.engine.scores import Collected, drawn_indices

FORMAT = "ssdd fidelity statistics 1"
KEPT_IMAGES = 100_000  # whose features are kept: two parts of 50 000 for a floor
FOREIGN_NETWORK = "inception"  # what mu and sigma of foreign files were measured with


def default_cache() -> Path:
    """Where statistics of references are kept unless a caller says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssdd" / "fidelity"


def measure(images: ImageSet, network: FeatureNetwork, batch_size: int, keep_features: bool = True) -> Statistics:
    """Statistics of all images of a set, in this process, on the network's device; no image is stored.

    keep_features: also keep features, those of 100 000 images at most.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    some = keep_features and len(images) > KEPT_IMAGES
    collected = Collected(network, drawn_indices(len(images), KEPT_IMAGES) if some else keep_features)
    for pixels, indices in images.batches(batch_size):
        collected.update(network.outputs(pixels.to(device)), indices)
    return collected.compute()


def measure_once(images: ImageSet, network: FeatureNetwork, batch_size: int, cache: Path) -> Statistics:
    """`measure`, or what it gave for the same images, crop and weights before: a file in the folder `cache`."""
    provenance = provenance_of(images, network)
    path = cache / f"{sha256_json(provenance)}.safetensors"
    if path.is_file():
        return load_statistics(path)[0]
    statistics = measure(images, network, batch_size)
    save_statistics(path, statistics, provenance)
    return statistics


def provenance_of(images: ImageSet, network: FeatureNetwork) -> dict[str, Any]:
    """What the statistics of a set are a function of: network, weights, resize, crop, size, counts, fingerprint."""
    treatment = images.treatment
    size = list(treatment.size) if treatment.size else None
    return {
        **network.provenance(),
        "crop": treatment.crop,
        "size": size,
        "count": len(images),
        "kept_features": min(KEPT_IMAGES, len(images)),
        "fingerprint": images.fingerprint(),
    }


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
        raise UserError(f"{path} is no whole safetensors file: {problem}") from problem
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


class SetToMeasure:
    """Anything with statistics: images, or a file of statistics, opened by path.

    treatment, describe(): as an `ImageSet`; statistics(network, ...): measured or read.
    """

    def __init__(self, path: str | Path, im_size: int | None = None, crop: str = "adm") -> None:
        self.path = Path(path)
        self.images: ImageSet | None = None
        self._loaded: tuple[Statistics, dict[str, Any]] | None = None
        if self.path.suffix == ".safetensors":
            self._loaded = load_statistics(self.path)
        elif self.path.suffix in (".pt", ".pth"):
            self._loaded = _torch_fidelity_file(self.path)
        elif self.path.suffix == ".npz" and self.path.is_file() and "mu" in _npz_names(self.path):
            if NPZ_IMAGES in _npz_names(self.path):
                self.images = open_set(self.path)
            self._loaded = _adm_file(self.path, self.images)
        else:
            self.images = open_set(path, im_size, crop)
        if self._loaded is None:
            self.treatment = self.images.treatment
        else:
            provenance = self._loaded[1]
            self.treatment = Treatment(provenance["crop"], tuple(provenance["size"]) if provenance["size"] else None)

    @property
    def count(self) -> int | None:
        """Images that the statistics are of, None when a foreign file does not say."""
        return self._loaded[0].count if self._loaded else len(self.images)

    def describe(self) -> dict[str, Any]:
        """What a result says of the set, in JSON values."""
        if self._loaded is None:
            return self.images.describe()
        return {"path": str(self.path), "statistics": self._loaded[1]}

    def statistics(
        self, network: FeatureNetwork, batch_size: int, keep_features: bool = True, cache: Path | None = None
    ) -> Statistics:
        """Statistics for `network`; with `cache` measured once. UserError as `check_network`.

        ADM's file says nothing of its count, and its features are those of its 10 000 images.
        """
        if self._loaded is None:
            if cache is not None:
                return measure_once(self.images, network, batch_size, cache)
            return measure(self.images, network, batch_size, keep_features)
        self.check_network(network)
        statistics = self._loaded[0]
        if self.images is not None and keep_features:
            features = measure(self.images, network, batch_size).features
            statistics = replace(statistics, features=features)
        return statistics

    def check_network(self, network: FeatureNetwork) -> None:
        """UserError when this is a file of another network's statistics."""
        if self._loaded is None:
            return
        statistics, provenance = self._loaded
        own = provenance["checksum"] is None or provenance["checksum"] == network.checksum
        if provenance["network"] != network.name or not own or len(statistics.mean) != network.dim:
            raise UserError(
                f"{self.path} was measured with {provenance['network']} (weights {provenance['checksum']}, "
                f"{len(statistics.mean)} numbers), not with {network.name} (weights {network.checksum}, {network.dim} "
                f"numbers); give features={provenance['network']}, or the images"
            )


def _adm_file(path: Path, images: ImageSet | None) -> tuple[Statistics, dict[str, Any]]:
    names = _npz_names(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s") if name in names}
    except ValueError as problem:
        raise UserError(f"{path}: mu and sigma are no plain arrays: {problem}") from problem
    spatial = None
    if {"mu_s", "sigma_s"} <= set(arrays):
        spatial = _gaussian(path, arrays["mu_s"], arrays["sigma_s"])
    statistics = replace(_gaussian(path, arrays["mu"], arrays.get("sigma", np.nan)), spatial=spatial)
    return statistics, _foreign_provenance(path, images)


def _torch_fidelity_file(path: Path) -> tuple[Statistics, dict[str, Any]]:
    """`NAME-EXTRACTOR-stat-fid-LAYER.pt` of torch-fidelity's cache: a dict of the arrays mu and sigma."""
    check_regular(path)
    numpy = np._core if hasattr(np, "_core") else np.core
    harmless = [numpy.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(harmless):
            file = torch.load(path, map_location="cpu", weights_only=True)
        mu, sigma = file["mu"], file["sigma"]
    except Exception as problem:  # unpickling raises almost anything on a foreign file
        raise UserError(f"{path} is no statistics file of torch-fidelity (mu, sigma): {problem}") from problem
    return _gaussian(path, mu, sigma), _foreign_provenance(path, None)


def _foreign_provenance(path: Path, images: ImageSet | None) -> dict[str, Any]:
    return {
        "network": FOREIGN_NETWORK,
        "checksum": None,
        "crop": "unknown",
        "size": list(images.treatment.size) if images is not None else None,
        "count": None,
        "fingerprint": sha256_file(path),
    }


def _gaussian(path: Path, mean: Any, cov: Any) -> Statistics:
    try:
        mean, cov = (torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in (mean, cov))
    except (TypeError, ValueError) as problem:
        raise UserError(f"{path}: mu and sigma are no numbers: {problem}") from problem
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or not _finite(mean, cov):
        raise UserError(
            f"{path}: mu {tuple(mean.shape)} and sigma {tuple(cov.shape)} are no finite mean and covariance"
        )
    return Statistics(None, mean, cov)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _npz_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as problem:
        raise UserError(f"{path} is not a whole npz file: {problem}") from problem
