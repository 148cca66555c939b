"""Programs that read, write and print alike in every locale: names of files are UTF-8, and printing never fails."""

from __future__ import annotations

import os
import sys


def use_utf8() -> None:
    """Call first in a program. In a locale of another encoding, Python starts again, as the same process, in UTF-8.

    What the terminal's encoding (PYTHONIOENCODING) lacks is printed as an escape such as \\xe4.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's or a test's has no encoding
            stream.reconfigure(errors="backslashreplace")
