"""The one error type for mistakes that a user can cause and correct."""

from __future__ import annotations

import errno


class UserError(ValueError):
    """A wrong argument, file, or environment, found before expensive work starts.

    The message says what was wrong, where, and what to do. Command line entry points print it as ``error: <message>``
    and exit with status 2; any other exception is a defect of this project and keeps its traceback.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has no message."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def full_disk(error: Exception) -> UserError | None:
    """The message for the user if `error` means that a disk is full, else None. safetensors has its own error type."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        where = getattr(error, "filename", None)
        place = f" at {where}" if where else ""
        return UserError(f"no space left on the disk{place}; earlier checkpoints are intact: make room, start again")
    return None
