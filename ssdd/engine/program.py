"""What every command of this project does around its work: text in any locale, and mistakes in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from ssdd.engine.errors import UserError, full_disk
from ssdd.engine.locale_independence import use_utf8


def run_program(work: Callable[[list[str]], int | None], argv: list[str] | None) -> int:
    """`work(arguments)`, those of the command line for None; returns the exit status.

    Its own (None: 0), 2 after an error that the user can mend, which is printed, and 130 after an interrupt.
    """
    if argv is None:
        use_utf8()
        argv = sys.argv[1:]
    try:
        return work(argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except Exception as error:  # libraries have their own types for a full disk; all else is raised again
        if (message := full_disk(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
    return 2


def named_paths(words: list[str]) -> tuple[list[str], list[str]]:
    """Arguments that are paths, written without a key, and those of the form key=value."""
    paths = [word for word in words if not word.startswith("-") and ("=" not in word or Path(word).exists())]
    return paths, [word for word in words if word not in paths]
