"""Files that are either whole or absent: atomic writes, JSON, and SHA-256 fingerprints."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden path beside ``path`` for its new content, which takes its place at the end of the block; see `put`.

    Parent folders are created. A writer that is killed may leave ``.<name>.<random>.tmp`` behind; see
    :func:`remove_leftovers`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        put(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put(temporary: Path, path: Path) -> None:
    """Give what is written its name, durably: ``path`` holds either its old or its new content, never a part."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) so that ``path`` holds either its old or its new content, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode(errors="surrogateescape") if isinstance(data, str) else data)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete what killed :func:`replacing` blocks left in ``folder``. Only for its single writer, when it starts."""
    for leftover in Path(folder).glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Make a file's content durable, or the renames and new names inside a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as indented standard JSON, atomically. :func:`plain` describes what is accepted."""
    write_atomic(path, json.dumps(plain(obj), indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. :class:`UserError` when it is missing or not JSON."""
    check_regular(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run what wrote it again") from None


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(obj: Any) -> str:
    """SHA-256 of ``obj`` as canonical JSON; the order of keys, and tuple or list, make no difference."""
    text = json.dumps(plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(obj: Any, *, standard: bool = True) -> Any:
    """``obj`` in terms of dict, list, str, int, float, bool and None.

    Dataclasses become dicts, paths strings, enums their names, arrays and tensors (nested) lists. Standard JSON has no
    NaN or infinity: they become None unless ``standard`` is false. TypeError for anything else.
    """
    if obj is None or isinstance(obj, (bool, str)):
        return obj
    if isinstance(obj, enum.Enum):
        return obj.name
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) or not standard else None
    if isinstance(obj, dict):
        return {str(key): plain(value, standard=standard) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value, standard=standard) for value in obj]
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: plain(getattr(obj, field.name), standard=standard) for field in dataclasses.fields(obj)}
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if hasattr(obj, "tolist"):  # numpy arrays and scalars, torch tensors
        return plain(obj.tolist(), standard=standard)
    raise TypeError(f"{type(obj).__name__} cannot be written as JSON: {obj!r}")
