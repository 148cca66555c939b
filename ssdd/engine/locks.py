"""Locks on files and folders, which the system releases when their process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held: set[int] = set()
"""Descriptors of this process's locks. A lock lasts as long as any process has its descriptor."""


def _leave_to_parent() -> None:
    """Close what a forked process has inherited, while a thread of its parent holds locks."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on an existing file or folder, against other processes and threads.

    It ends with the block or the process, whatever has been forked meanwhile; a forked process does not hold it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor in _held:  # not in a process forked inside the block
            try:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # at once: a process that is being forked has it still open
            finally:
                _held.remove(descriptor)
                os.close(descriptor)
