"""Checkpoints: folders of named safetensors files and a ``state.json``, replaced as a whole, and references to them.

A folder is complete when it has its ``state.json``, which is written last. While one is replaced, ``<folder>.new`` and
``<folder>.old`` exist beside it; whatever instant the writer is killed at, one of the three is complete, and reading
finds it. One process writes a folder; any number may read it meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import plain, replacing, sync, write_atomic
from ssdd.engine.sharding import laid_out_as

STATE_FILE = "state.json"
STEP_NAME = re.compile(r"step-(\d{6,})")
# Averaged weights first; then the names in folders of the official SSDD code, and of diffusers.
WEIGHT_FILES = (
    "model_ema.safetensors",
    "model_ae_ema.safetensors",
    "model_1.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
)
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # the others are torch files, read with weights_only


def save(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Replace ``folder`` by ``<name>.safetensors`` for each name of ``tensors``, with ``metadata``, and ``state.json``.

    ``state`` is made of JSON values with string keys; floats, also NaN and infinities, come back exactly. Equal
    arguments give equal bytes. Everything is on disk when this returns.
    """
    with _replaced(Path(folder)) as new:
        for name, group in tensors.items():
            save_tensors(new / f"{name}.safetensors", group, metadata)
        write_atomic(new / STATE_FILE, json.dumps(state, indent=1, default=plain) + "\n")


def link(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Replace ``folder`` by the checkpoint ``source``, which costs no space: weights are hard links where those exist.

    Both may be replaced or deleted later without harm to the other, since no file of a checkpoint is changed in place.
    """
    source = Path(source)
    with _replaced(Path(folder)) as new:
        for path in source.glob("*.safetensors"):
            try:
                os.link(path, new / path.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, new / path.name)
                sync(new / path.name)
        write_atomic(new / STATE_FILE, (source / STATE_FILE).read_bytes())


def step_name(step: int) -> str:
    """Name of the checkpoint that is kept of ``step``: ``step-000123``."""
    return f"step-{step:06d}"


def keep_newest(checkpoints: str | os.PathLike[str], count: int) -> None:
    """Delete all but the ``count`` newest of the folders in ``checkpoints`` that have a :func:`step_name`."""
    named = ((STEP_NAME.fullmatch(path.name), path) for path in Path(checkpoints).glob("step-*"))
    steps = sorted((int(match[1]), path) for match, path in named if match)
    for _, path in steps[: max(0, len(steps) - count)]:
        (path / STATE_FILE).unlink(missing_ok=True)  # from here on it is not a checkpoint any more
        shutil.rmtree(path)


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """``(tensors, state)`` as given to :func:`save`, on the CPU. :class:`UserError` when missing or damaged."""
    folder = Path(folder)
    for _ in range(100):
        before = _identity(folder)
        if before is None:
            raise UserError(f"{folder}: no complete checkpoint there (a folder of .safetensors files and {STATE_FILE})")
        try:
            content = _read(before[0])
        except (OSError, RuntimeError, ValueError):
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return content
    raise UserError(f"{folder}: a writer replaces it faster than it can be read; stop that process first")


def load_state(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The ``state`` of a complete checkpoint, without its tensors; None where there is none."""
    found = _complete(Path(folder))
    return None if found is None else json.loads((found / STATE_FILE).read_text(encoding="utf-8"))


def exists(folder: str | os.PathLike[str]) -> bool:
    """Whether :func:`load` finds a complete checkpoint for ``folder``."""
    return _complete(Path(folder)) is not None


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; unlike the library's writer, equal content always gives equal bytes.

    Tensors may live on any device, share memory (tied weights are written twice) and have any strides.
    """
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask allows; the library makes files private
        save_file(owned, temporary, dict(metadata) if metadata else None)
        with open(temporary, "r+b") as file:
            _sort_metadata(file)
        temporary.chmod(mode)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU. :class:`UserError` when it is damaged."""
    check_regular(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy or train it again") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as (flat tensors, JSON values); :func:`load_optimizer` restores it bit for bit.

    Tensors are named ``<parameter index>.<state name>``, tensor hyperparameters ``group<index>.<name>``.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    return tensors, {
        "shapes": _parameter_shapes(optimizer),
        "state": {str(i): _flatten(entry, f"{i}.", tensors) for i, entry in state["state"].items()},
        "param_groups": [_flatten(group, f"group{i}.", tensors) for i, group in enumerate(state["param_groups"])],
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Restore what :func:`optimizer_tensors` gave, hyperparameters such as the learning rate included.

    State goes to the device and the memory layout of its parameter and keeps its saved dtype. :class:`UserError` when
    the optimizer has other parameters than the saved one.
    """
    groups = [_unflatten(group, tensors) for group in values["param_groups"]]
    state = {int(i): _unflatten(entry, tensors) for i, entry in values["state"].items()}
    if (shapes := _parameter_shapes(optimizer)) != values["shapes"]:
        saved, here = ([len(group) for group in groups] for groups in (values["shapes"], shapes))
        raise UserError(
            f"the optimizer state is for parameters of other shapes (groups of {saved} tensors) than the model's "
            f"(groups of {here}): the checkpoint belongs to another model; use its config, or another run_name"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for i, parameter in enumerate(parameters):
        for name, value in state.get(i, {}).items():
            if not isinstance(value, Tensor) or name == "step" or value.dim() == 0:
                continue  # load_state_dict keeps these exact and knows which device they belong on
            like = parameter if value.shape == parameter.shape else value
            restored = torch.empty_like(like, dtype=value.dtype, device=parameter.device, requires_grad=False)
            optimizer.state[parameter][name] = restored.copy_(laid_out_as(restored, value))


def resolve(reference: str, ckpt_dir: str | os.PathLike[str]) -> Path:
    """The weights file that ``reference`` means.

    ``run``, ``run@last`` (the same), ``run@best`` or ``run@step-000123`` below ``ckpt_dir/jobs``; a checkpoint, run,
    official or diffusers directory; or a file. Averaged (EMA) weights are preferred. :class:`UserError` lists what was
    looked for and the runs that exist.
    """
    if not reference:
        raise UserError("empty checkpoint reference; give a run name, run@best, a directory or a .safetensors file")
    jobs, path = Path(ckpt_dir) / "jobs", Path(reference).expanduser()
    if path.suffix in SUFFIXES and not path.is_dir():
        check_regular(path)
    if path.is_file():
        if path.suffix in SUFFIXES:
            return path
        raise UserError(f"{path}: not a weights file; these end in {', '.join(SUFFIXES)}")
    is_name = len(path.parts) == 1 and path.suffix not in SUFFIXES
    run, _, which = reference.partition("@") if is_name else ("", "", "")
    folders = [path, path / "checkpoints" / "last"] if path.suffix not in SUFFIXES else []
    if is_name:
        folders.insert(0, jobs / run / "checkpoints" / (which or "last"))
    for folder in folders:
        found = _complete(folder) or folder
        for name in WEIGHT_FILES:
            if (found / name).is_file():
                return found / name
    message = f"no weights for {reference!r}; looked for {' or '.join(str(place) for place in folders or [path])}"
    if folders:
        message += f" with one of {', '.join(WEIGHT_FILES)}"
    if kept := _checkpoint_names(jobs / run / "checkpoints") if is_name else []:
        raise UserError(f"{message}; there is {', '.join(f'{run}@{name}' for name in kept)}")
    runs = sorted(folder.name for folder in jobs.glob("*") if folder.is_dir())
    raise UserError(f"{message}; runs in {jobs}: {', '.join(runs) or 'none'}")


def _checkpoint_names(checkpoints: Path) -> list[str]:
    names = {path.name.removesuffix(".new").removesuffix(".old") for path in checkpoints.glob("*")}
    return sorted(name for name in names if exists(checkpoints / name))


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder to be filled, its state file last, that then takes the place of ``folder``."""
    new, old = _beside(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    found = _complete(folder)
    if found is not None and found != folder:  # a writer was killed between its two renames
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(found, folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    yield new
    sync(new)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")


def _complete(folder: Path) -> Path | None:
    """Where the newest complete content for ``folder`` lies: a finished ``.new`` counts once ``folder`` was moved."""
    new, old = _beside(folder)
    for _ in range(2):  # twice, for a writer may rename between two looks
        for place in (folder, new, old):
            if (place / STATE_FILE).is_file():
                return place
    return None


def _identity(folder: Path) -> tuple[Path, int, int] | None:
    """The place of the newest complete content, and numbers that change when a writer puts other content there."""
    for _ in range(10):
        found = _complete(folder)
        try:
            status = found.stat() if found is not None else None
        except FileNotFoundError:
            continue  # renamed since; look again
        return None if found is None else (found, status.st_ino, status.st_mtime_ns)
    return None


def _read(found: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    try:
        state = json.loads((found / STATE_FILE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{found / STATE_FILE}: not valid JSON ({error}); delete the checkpoint {found}") from None
    return {path.stem: load_tensors(path) for path in sorted(found.glob("*.safetensors"))}, state


def _sort_metadata(file: Any) -> None:
    """Put the header's metadata in alphabetical order, which the library leaves to chance."""
    (size,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(size))
    if len(header.get("__metadata__", {})) < 2:
        return
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(encoded) > size:
        raise ValueError("metadata holds characters that JSON writers encode differently; use plain text")
    file.seek(8)
    file.write(encoded + b" " * (size - len(encoded)))
    file.flush()


def _parameter_shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _flatten(entry: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in entry.items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
            flat[name] = {"tensor": prefix + name}
        elif isinstance(value, tuple):
            flat[name] = {"tuple": list(value)}
        else:
            flat[name] = value
    return flat


def _unflatten(flat: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name, value in flat.items():
        if isinstance(value, dict) and "tensor" in value:
            entry[name] = tensors[value["tensor"]]
        else:
            entry[name] = tuple(value["tuple"]) if isinstance(value, dict) else value
    return entry
