"""Locks on files and folders, which the system releases when their process ends.

The package filelock has no lock for this: its native one is exclusive only, takes a file of its own beside what it
protects, and can't be handed to a child program, as the pipeline's is to its stages.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_open: set[Lock] = set()
"""Locks of this process. A lock lasts as long as any process has its descriptor."""


class Lock:
    """The lock on an existing file or folder, against other processes and threads; held from `claim` or `share` on.

    It ends with its `with` block or the process, whatever has been forked meanwhile; a forked process does not hold it.
    """

    def __init__(self, path: Path, optional: bool = False) -> None:
        """optional: continue without a lock where the file system has none, instead of an OSError."""
        self.path, self.optional, self._handed_on = path, optional, False
        # Over NFS, only a file that is open for writing can be claimed.
        writable = path.is_file() and os.access(path, os.W_OK)
        self._descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        _open.add(self)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        if self in _open:  # not in a process forked inside the block
            try:
                if not self._handed_on:  # at once: a process that is being forked has it still open
                    self._flock(fcntl.LOCK_UN)
            finally:
                self._close()

    def claim(self, holder: str = "") -> None:
        """Wait until nobody else holds it. holder: who might, such as "another build", for a warning about the wait."""
        try:
            self._flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if holder:
                log.warning("%s holds the lock on %s: waiting until it ends", holder, self.path)
            self._flock(fcntl.LOCK_EX)

    def share(self) -> None:
        """Hold it together with others that share it; what was claimed is given up for that."""
        self._flock(fcntl.LOCK_SH)

    def hand_on(self) -> int:
        """The descriptor for a child program, which then holds the lock as well, also after the `with` block."""
        self._handed_on = True
        return self._descriptor

    def _flock(self, how: int) -> None:
        try:
            fcntl.flock(self._descriptor, how)
        except BlockingIOError:
            raise
        except OSError as problem:
            if not self.optional:
                raise
            log.debug("the file system of %s has no locks (%s): continuing without them", self.path, problem)

    def _close(self) -> None:
        _open.remove(self)
        os.close(self._descriptor)


def _leave_to_parent() -> None:
    """Close what a forked process has inherited, while a thread of its parent holds locks."""
    for lock in list(_open):
        lock._close()


os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on an existing file or folder alone."""
    with Lock(path) as lock:
        lock.claim()
        yield
