"""Anything with statistics, opened by path: a set of images, our statistics file, or another evaluator's.

Also read: ADM's npz (`mu`, `sigma`, `mu_s`, `sigma_s`, and `arr_0` with the images of precision and recall), npz with
`mu` and `sigma` of other evaluators, and the files of torch-fidelity's cache. Nothing in a foreign file is executed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file
from ssdd.engine.pretrained import read_torch_file
from ssdd.engine.processes import Processes
from ssdd.fidelity.features import FeatureNetwork
from ssdd.fidelity.measure import BATCH, load_statistics, measure_once
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.stored_sets import NPZ_IMAGES, StoredSet, Treatment, open_set

FOREIGN_NETWORK = "inception"  # what mu and sigma of foreign files were measured with


class SetToMeasure:
    """Anything with statistics: images, or a file of statistics, opened by path.

    treatment, describe(): as a `StoredSet`; statistics(networks, ...): measured or read.
    """

    def __init__(self, path: str | Path, im_size: int | None = None, crop: str = "adm") -> None:
        self.path = Path(path)
        self.images: StoredSet | None = None
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
        """Images that the statistics are of, None when a foreign file does not record it."""
        return self._loaded[0].count if self._loaded else len(self.images)

    def describe(self) -> dict[str, Any]:
        """What a result records of the set, in JSON values."""
        if self._loaded is None:
            return self.images.describe()
        return {"path": str(self.path), "statistics": self._loaded[1]}

    def statistics(
        self,
        networks: Sequence[FeatureNetwork],
        processes: Processes,
        cache: Path | None = None,
        batch_size: int = BATCH,
    ) -> dict[str, Statistics]:
        """Network name -> statistics, read or measured as by `measure_once`. UserError as `check_network`.

        ADM's file does not record its count, and its features are those of its 10 000 images.
        """
        for network in networks:
            self.check_network(network)
        measured = measure_once(self.images, networks, processes, cache, batch_size) if self.images is not None else {}
        if self._loaded is None or not processes.is_main:
            return measured
        statistics = self._loaded[0]
        if self.images is None:
            return {network.name: statistics for network in networks}
        return {name: replace(statistics, features=of_images.features) for name, of_images in measured.items()}

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


def _adm_file(path: Path, images: StoredSet | None) -> tuple[Statistics, dict[str, Any]]:
    names = _npz_names(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s") if name in names}
    except ValueError as problem:
        raise UserError(f"{path}: mu and sigma are not plain arrays: {problem}") from problem
    spatial = None
    if {"mu_s", "sigma_s"} <= set(arrays):
        spatial = _gaussian(path, arrays["mu_s"], arrays["sigma_s"])
    statistics = replace(_gaussian(path, arrays["mu"], arrays.get("sigma", np.nan)), spatial=spatial)
    return statistics, _foreign_provenance(path, images)


def _torch_fidelity_file(path: Path) -> tuple[Statistics, dict[str, Any]]:
    """`NAME-EXTRACTOR-stat-fid-LAYER.pt` of torch-fidelity's cache: a dict of the arrays mu and sigma."""
    numpy = np._core if hasattr(np, "_core") else np.core
    harmless = [numpy.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType]
    expected = "a statistics file of torch-fidelity (mu, sigma)"
    mu, sigma = read_torch_file(path, expected, itemgetter("mu", "sigma"), classes=harmless)
    return _gaussian(path, mu, sigma), _foreign_provenance(path, None)


def _foreign_provenance(path: Path, images: StoredSet | None) -> dict[str, Any]:
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
        raise UserError(f"{path}: mu and sigma are not numbers: {problem}") from problem
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or not _finite(mean, cov):
        raise UserError(
            f"{path}: mu {tuple(mean.shape)} and sigma {tuple(cov.shape)} are not a finite mean and covariance"
        )
    return Statistics(None, mean, cov)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _npz_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as problem:
        raise UserError(f"{path} is not a complete npz file: {problem}") from problem
