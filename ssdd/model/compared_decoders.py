"""Decoders to compare side by side: `name:checkpoint reference:steps`, or `name:diffusers:PATH` for a KL-VAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssdd.engine.checkpoint import resolve
from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_file
from ssdd.model.foreign_encoders import KLVAE, encoder_fingerprint
from ssdd.model.tokenizer import SSDD

DIFFUSERS = "diffusers:"


@dataclass
class Row:
    """A row of a result table: a tokenizer decoding in `steps` steps (a KL-VAE: 1)."""

    name: str
    tokenizer: SSDD | KLVAE
    steps: int
    reference: str = ""
    checksum: str = ""

    def provenance(self) -> dict[str, Any]:
        """What a result records of the decoder: reference, sha256 of its weights, steps, sizes, encoder."""
        return {
            "reference": self.reference,
            "weights": self.checksum,
            "steps": self.steps,
            "decoder": self.tokenizer.config["decoder"],
            "sampler": self.tokenizer.config["fm_sampler"],
            "encoder_fingerprint": self.tokenizer.encoder_fingerprint(),
        }


RESERVED = ("originals", "reals", "blur", "PCA")
"""How names of other image sets in a table begin."""


def open_rows(specifications: Sequence[str], ckpt_dir: str | Path, device: torch.device) -> list[Row]:
    """Rows from `name:reference:steps` or `name:diffusers:PATH`; each file is loaded once. UserError for other text."""
    rows: list[Row] = []
    loaded: dict[str, tuple[SSDD | KLVAE, str]] = {}
    for specification in specifications:
        name, _, rest = specification.partition(":")
        reference, _, steps = (rest, "", "1") if rest.startswith(DIFFUSERS) else rest.rpartition(":")
        if not (name and reference.removeprefix(DIFFUSERS) and steps.isdecimal() and int(steps) > 0):
            raise UserError(
                f"decoder {specification!r}: expected name:checkpoint reference:steps, as student:my_run:1, or "
                f"name:{DIFFUSERS}PATH for a KL-VAE"
            )
        if name.startswith(RESERVED):
            raise UserError(f"decoder {specification!r}: {', '.join(RESERVED)} are reserved names; choose another name")
        if "/" in name or name.startswith("."):
            raise UserError(f"decoder {specification!r}: its name becomes a folder: use no / and no leading dot")
        if name in (row.name for row in rows):
            raise UserError(f"two decoders are called {name!r}; give each its own name")
        if reference not in loaded:
            tokenizer, checksum = _load(reference, ckpt_dir)
            loaded[reference] = tokenizer.to(device).eval().requires_grad_(False), checksum
        tokenizer, checksum = loaded[reference]
        rows.append(Row(name, tokenizer, int(steps), reference, checksum))
    return rows


def _load(reference: str, ckpt_dir: str | Path) -> tuple[SSDD | KLVAE, str]:
    """A tokenizer, and the sha256 of its weights file (of a KL-VAE: of its tensors)."""
    if reference.startswith(DIFFUSERS):
        tokenizer = KLVAE.from_pretrained(reference.removeprefix(DIFFUSERS))
        return tokenizer, encoder_fingerprint(tokenizer.vae)
    return SSDD.from_pretrained(reference, ckpt_dir), sha256_file(resolve(reference, ckpt_dir))
