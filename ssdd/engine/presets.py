"""The YAML files of ``configs/``: where they lie, and which there are."""

from __future__ import annotations

import difflib
from pathlib import Path

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular


def configs_dir() -> Path:
    """The folder of the YAML files: ``configs/`` of a checkout, else the copy inside the installed package."""
    here = Path(__file__).resolve()
    repository = here.parents[2]
    if (repository / "pyproject.toml").is_file() and (repository / "configs").is_dir():
        return repository / "configs"
    return here.parents[1] / "_configs"


def available(kind: str) -> list[str]:
    """Names of the YAML files under ``configs/<kind>/`` (``presets`` or ``blocks``), subfolders as ``folder/name``."""
    folder = configs_dir() / kind
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def named_file(key: str, kind: str, name: str) -> Path:
    """The file that ``key=name`` means: a path ending in ``.yaml`` or ``.yml``, else one of :func:`available`.

    UserError, with the nearest name, where there is none.
    """
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else configs_dir() / kind / f"{name}.yaml"
    if path.is_file():
        return path
    check_regular(path)
    names = available(kind)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {key}={near[0]}?" if near else f"available: {', '.join(names) or 'none'}"
    raise UserError(f"argument '{key}={name}': no file {path}; {hint}")
