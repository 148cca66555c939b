"""Where this user's programs keep what can be made again, and this project among them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ssdd.engine.errors import UserError


def caches_of_user() -> Path:
    """The folder of all programs, by the XDG rules: $XDG_CACHE_HOME or ~/.cache. RuntimeError without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def cache_folder() -> Path:
    """Where downloads and indices of this project lie: $XDG_CACHE_HOME/ssdd or ~/.cache/ssdd.

    Without a home, or with one that is not there and can't be made, a folder of this user's below $TMPDIR.
    """
    try:
        folder = caches_of_user() / "ssdd"
        if folder.is_dir():
            return folder
        there = next(parent for parent in folder.absolute().parents if parent.exists())
        usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except (RuntimeError, PermissionError):  # no home and no such user, as in containers with --user; another's home
        usable = False
    return folder if usable else _temporary_cache()


def _temporary_cache() -> Path:
    """Refused if another user has made it: its content would be theirs."""
    folder = Path(tempfile.gettempdir()) / f"ssdd-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set HOME or XDG_CACHE_HOME to a folder of your own")
    return folder
