"""Script: run dit's tasks in child processes that SIGKILL themselves at ever other moments, until one of them ends.

Usage: killed.py key=value ... (as for dit/main.py). A moment is a sync or a rename: between two of them nothing durable
happens. Prints the number of killed processes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import sklearn.datasets  # noqa: F401  (imported once here, not in every child)
import timm  # noqa: F401

import dit.evaluation.evaluate  # noqa: F401
from dit.main import main


def deadly(operation: Callable[..., Any], calls_left: list[int]) -> Callable[..., Any]:
    """`operation`, but the process dies instead of making the last of all `calls_left`."""

    def call(*args: Any) -> Any:
        calls_left[0] -= 1
        if calls_left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*args)

    return call


def run_until_killed(arguments: list[str], moment: int) -> int:
    """Wait status of a child that works until its `moment`th sync or rename."""
    child = os.fork()
    if child == 0:
        calls_left = [moment]
        os.fsync, os.replace = deadly(os.fsync, calls_left), deadly(os.replace, calls_left)
        os._exit(main(arguments))
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    killed = 0
    while (status := run_until_killed(sys.argv[1:], 11 + 6 * killed)) != 0:
        if not os.WIFSIGNALED(status):
            sys.exit(f"the command failed after {killed} kills")
        killed += 1
    print("killed", killed)
