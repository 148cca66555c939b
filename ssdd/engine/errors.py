"""The one error type for mistakes that a user can cause and mend."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong argument, file, or environment, found before expensive work starts.

    The message says what was wrong, where, and what to do. Command line entry points print it as ``error: <message>``
    and exit with status 2; any other exception is a defect of this project and keeps its traceback.
    """
