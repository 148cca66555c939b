"""Decoders to compare side by side, as `name:checkpoint reference:steps` on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ssdd.engine.errors import UserError
from ssdd.tokenizer import SSDD


@dataclass
class Row:
    """A row of a result table: a tokenizer decoding in `steps` steps."""

    name: str
    tokenizer: SSDD
    steps: int


RESERVED = ("originals", "reals", "blur", "PCA")
"""How names of other image sets in a table begin."""


def open_rows(specifications: Sequence[str], ckpt_dir: str | Path, device: torch.device) -> list[Row]:
    """Rows from `name:reference:steps`; each tokenizer is loaded once. UserError for anything else."""
    rows: list[Row] = []
    loaded: dict[str, SSDD] = {}
    for specification in specifications:
        name, _, rest = specification.partition(":")
        reference, _, steps = rest.rpartition(":")
        if not (name and reference and steps.isdecimal() and int(steps) > 0):
            raise UserError(f"decoder {specification!r}: expected name:checkpoint reference:steps, as student:my_run:1")
        if name.startswith(RESERVED):
            raise UserError(f"decoder {specification!r}: {', '.join(RESERVED)} are other rows; choose another name")
        if name in (row.name for row in rows):
            raise UserError(f"two decoders are called {name!r}; give each its own name")
        if reference not in loaded:
            loaded[reference] = SSDD.from_pretrained(reference, ckpt_dir).to(device).eval().requires_grad_(False)
        rows.append(Row(name, loaded[reference], int(steps)))
    return rows
