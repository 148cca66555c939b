"""PNG files of 8-bit pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ssdd.engine.files import write_atomic


def png_bytes(picture: np.ndarray) -> bytes:
    """Encode a uint8 [H, W, 3] or [H, W] array as PNG; equal arrays give equal bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: str | Path, picture: np.ndarray) -> None:
    """Write a uint8 [H, W, 3] or [H, W] array as PNG; makes the folder when it is missing."""
    write_atomic(path, png_bytes(picture))
