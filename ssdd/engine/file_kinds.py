"""Only regular files hold data. Opening a named pipe waits for a writer forever; a device may never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ssdd.engine.errors import UserError

KINDS = (
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISDIR, "a folder"),
)


def other_kind(path: str | os.PathLike[str]) -> str | None:
    """What ``path`` is, links followed, when it is not a regular file: a named pipe, a socket, a broken link, ...

    None for a regular file, and where nothing is. OSError when the folder that it lies in can't be searched.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return f"a broken link to {os.readlink(path)}" if os.path.islink(path) else None
    except OSError:
        if os.path.islink(path):  # a circle of links
            return f"a link that can't be followed, to {os.readlink(path)}"
        raise
    if stat.S_ISREG(mode):
        return None
    return next((name for is_kind, name in KINDS if is_kind(mode)), "a special file")


def check_regular(path: str | os.PathLike[str]) -> None:
    """:class:`UserError` when ``path`` is there and, links followed, not a regular file. Call it before opening."""
    if (kind := other_kind(path)) is not None:
        raise UserError(f"{Path(path)} is {kind}, not a regular file: replace or remove it")
