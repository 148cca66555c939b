"""Checkpoints of facebookresearch/DiT, SiT, REPA and LightningDiT in, and ours out in their layout.

The tensors need no conversion, because our names and shapes are the same. What differs is what a network's time and
output mean: this is kept as the model's `convention` (`dit.time_convention`), so that a loaded model samples with our
samplers.

A file does not record the scale of its latents: DiT, SiT and REPA model SD-VAE latents times 0.18215, LightningDiT
those of VA-VAE, normalised per channel. Guidance on the first three channels, as their tables use, is
`sampling.cfg_channels=3`; DiT's noise predictors like `sampling.shift=3.4`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.layers import sincos_position_table
from dit.model import DiT, read_options
from dit.options import SIZES, VARIANTS, DiTOptions
from dit.time_convention import Convention, DDPMConvention, convention
from ssdd.engine.checkpoint import load_tensors, save_tensors
from ssdd.engine.errors import UserError
from ssdd.engine.pretrained import read_torch_file

log = logging.getLogger(__name__)

Weights = Mapping[str, Tensor]
Record = Mapping[str, Any]
"""What a file holds besides weights: arguments, step."""


@dataclass(frozen=True)
class Family:
    """Whose code trained a network: its convention in `dit.time_convention`, and how one of its files is recognised."""

    convention: str
    recognised: Callable[[Weights, Record], bool]


def _names_its_model(prefix: str) -> Callable[[Weights, Record], bool]:
    return lambda weights, record: str(_arguments(record).get("model", "")).lower().startswith(prefix)


def _is_repa(weights: Weights, record: Record) -> bool:
    return "steps" in record or any(key.startswith("projectors.") for key in weights)


def _is_lightningdit(weights: Weights, record: Record) -> bool:
    modern = any(VARIANTS[name](weights) for name in ("rope", "rms_norm", "swiglu"))
    return not _is_repa(weights, record) and ("config" in record or modern)


FAMILIES = {
    "dit": Family("ddpm", _names_its_model("dit")),
    "sit": Family("sit", _names_its_model("sit")),
    "repa": Family("repa", _is_repa),
    "lightningdit": Family("sit", _is_lightningdit),
}
"""Asked from the last to the first, since REPA's files name SiT's models."""

LAYOUTS = ("dit", "sit")


def load_dit(
    path: str | Path,
    family: str | None = None,
    *,
    input_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    heads: int | None = None,
) -> DiT:
    """The network in a weights file of ours or of another repository, with EMA weights if there are any, in eval mode.

    path: `.safetensors`, or a torch file with a bare state dict or {"model", "ema", "opt", "args" ...}. Nothing in it
    is executed: besides tensors and plain values, `argparse.Namespace` alone is let through.
    family: "dit", "sit", "repa" or "lightningdit". By default it is inferred from the file: projectors mean REPA (they
    are dropped), LightningDiT's layers LightningDiT, recorded arguments the model that they name. A bare file in the
    plain layout does not record whether it predicts noise or velocity; `family` must then be given.
    input_size: latent side or (height, width) to use it for, by default what it was trained on; see
    `DiT.from_pretrained`. in_channels, num_classes: what the caller's latents have, to be checked.
    heads: number of attention heads, which a file without qk-norm and rotary embedding does not record; the published
    depths and widths are known.
    The label table's last row is taken as the null class, unless it has exactly `num_classes` rows. REPA's and SiT's
    straight path with a velocity is what can be read, no other path or prediction.
    UserError for all that does not fit, with what the file has.
    """
    path = Path(path)
    if family is not None and family not in FAMILIES:
        raise UserError(f"family={family!r}: expected one of {', '.join(FAMILIES)}")
    if (options := read_options(path)) is not None:
        if family is not None:
            raise UserError(f"{path} is a file of this project, which records its convention; leave out {family=}")
        _check_wanted(options, path, in_channels, num_classes)
        return DiT.from_weights(options, load_tensors(path), path, input_size)
    weights, record = _read_checkpoint(path)
    if projectors := [key for key in weights if key.startswith("projectors.")]:
        log.warning("%s: ignored REPA's %d projector tensors, which only its training uses", path, len(projectors))
    family = family or _family(weights, record, path)
    _check_path(record, family, path)
    weights = {key: value for key, value in weights.items() if not key.startswith("projectors.")}
    options = _options(weights, FAMILIES[family], path, heads, input_size, num_classes)
    _check_wanted(options, path, in_channels, num_classes)
    # A copy, for torch files are mapped and might be replaced by their trainer.
    weights = {key: value.to(torch.float32, copy=True) for key, value in weights.items()}
    return DiT.from_weights(options, weights, path, input_size)


def export_dit(model: DiT, path: str | Path, layout: str = "dit") -> Path:
    """Write a model's weights for other repositories' code as a `.safetensors` file, and return its path.

    The metadata hold the architecture (`dit`) and the meaning of time and output in words (`convention`).

    - layout "dit": the tensors as they are, for any model. facebookresearch/DiT's network computes what ours computes,
      but its diffusion samplers are right for noise predictors (loaded DiT files) only; a flow model trained here
      wants an Euler loop along its velocity.
    - layout "sit": for SiT's and LightningDiT's own samplers, whose network is given t' = 1 - t in [0, 1]. The
      reversal of time is exact: cos and sin of w (1 - t') are a rotation of cos and sin of w t', which goes into the
      first linear layer of the time embedding; so is REPA's sign, which goes into the last. The factor of 1000 is not:
      the sinusoids of 1000 t' are not linear functions of those of t'. So models of time_scale 1 alone can be
      exported (train with model.time_scale=1), and noise predictors cannot. Build SiT with the `learn_sigma` of the
      metadata.
    UserError where a layout cannot express the model.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: the export is a safetensors file; give a name that ends in .safetensors")
    weights, options = dict(model.state_dict()), model.options
    if layout == "sit":
        weights, options = _as_sit(weights, model.convention), replace(options, convention="sit")
    meaning = convention(options.convention, options.time_scale).meaning
    save_tensors(path, weights, {"dit": json.dumps(options.to_dict()), "layout": layout, "convention": meaning})
    return path


def _as_sit(weights: dict[str, Tensor], own: Convention) -> dict[str, Tensor]:
    """Weights that compute the same velocity under SiT's convention as these do under their `own`."""
    if isinstance(own, DDPMConvention):
        raise UserError('a noise predictor is not a velocity field of SiT\'s path; export it with layout="dit"')
    if own.time_scale != 1:
        raise UserError(
            f"SiT feeds its network t in [0, 1], and this one was trained on {own.time_scale:g} t: the "
            'weights cannot be converted. Train with model.time_scale=1, or export with layout="dit"'
        )
    if not own.time_reversed:
        first = weights["t_embedder.mlp.0.weight"].double()
        cosines, sines = first.chunk(2, dim=1)  # [h, 128] each, by frequency
        half = cosines.shape[1]
        frequency = torch.exp(
            torch.arange(half, dtype=torch.float64, device=first.device) * (-math.log(10000.0) / half)
        )
        rotated = torch.cat(
            [
                cosines * frequency.cos() + sines * frequency.sin(),
                cosines * frequency.sin() - sines * frequency.cos(),
            ],
            dim=1,
        )
        weights["t_embedder.mlp.0.weight"] = rotated.to(weights["t_embedder.mlp.0.weight"].dtype)
    if own.sign < 0:
        for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
            weights[key] = -weights[key]
    return weights


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The (averaged) weights under their plain names, and what else the file records."""
    if path.suffix == ".safetensors":
        content: Any = load_tensors(path)
    else:
        expected = "a checkpoint of tensors and recorded arguments"
        content = read_torch_file(path, expected, classes=[argparse.Namespace], mmap=True)
    record: dict[str, Any] = {}
    if isinstance(content, dict):
        name = next((name for name in ("ema", "model", "state_dict") if isinstance(content.get(name), dict)), None)
        if name is not None:
            record = {key: value for key, value in content.items() if key not in ("ema", "model", "opt")}
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict: expected named tensors, perhaps below 'ema' or 'model'")
    return {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in content.items()}, record


def _arguments(record: Record) -> dict[str, Any]:
    """The recorded settings: DiT's, SiT's and REPA's Namespace, or the transport section of LightningDiT's config."""
    if isinstance(record.get("args"), argparse.Namespace):
        return vars(record["args"])
    transport = record["config"].get("transport") if isinstance(record.get("config"), dict) else None
    return transport if isinstance(transport, dict) else {}


def _family(weights: Weights, record: Record, path: Path) -> str:
    for name, family in reversed(FAMILIES.items()):
        if family.recognised(weights, record):
            return name
    *names, last = FAMILIES
    raise UserError(
        f"{path} may be a noise predictor or a velocity field: the tensors of DiT, SiT and REPA have the same names, "
        f"and the file records no arguments. Name the code that trained it: family={', '.join(names)} or {last} "
        "(task=sample: sampling.family=...)"
    )


def _check_path(record: Record, family: str, path: Path) -> None:
    """UserError when the recorded settings are not a velocity along the straight path."""
    if FAMILIES[family].convention == "ddpm":
        return
    arguments = _arguments(record)
    for key, known in (("path_type", ("linear",)), ("prediction", ("velocity", "v"))):
        if (value := arguments.get(key)) is not None and str(value).lower() not in known:
            raise UserError(f"{path} was trained with {key}={value}; only {key}={known[0]} can be read")


def _options(
    weights: Weights,
    family: Family,
    path: Path,
    heads: int | None,
    input_size: int | tuple[int, int] | None,
    num_classes: int | None,
) -> DiTOptions:
    """The options of a network of times in [0, 1], or of DDPM's steps, from names and shapes."""
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight")
    needed += ("final_layer.linear.weight", "blocks.0.adaLN_modulation.1.weight")
    if missing := [key for key in needed if key not in weights]:
        raise UserError(f"{path} is not a DiT, SiT, REPA or LightningDiT checkpoint: it lacks {', '.join(missing)}")
    width, channels, patch = weights["x_embedder.proj.weight"].shape[:3]
    depth = 1 + max(int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key)))
    outputs = len(weights["final_layer.linear.weight"]) // patch**2
    if outputs not in (channels, 2 * channels):
        raise UserError(f"{path} predicts {outputs} channels from {channels}; expected as many, or twice as many")
    known = {(depth, width): (size, heads) for size, (depth, width, heads) in SIZES.items()}
    size, known_heads = known.get((depth, width), (None, None))
    if "blocks.0.attn.q_norm.weight" in weights:
        heads = width // len(weights["blocks.0.attn.q_norm.weight"])
    elif "feat_rope.freqs_cos" in weights:
        heads = width // weights["feat_rope.freqs_cos"].shape[-1]
    heads = heads or known_heads
    if heads is None:
        raise UserError(
            f"{path}: {depth} blocks of width {width} are not a published size, and the number of attention "
            "heads cannot be inferred from the weights; give load_dit(..., heads=N)"
        )
    rows = len(weights["y_embedder.embedding_table.weight"])
    return DiTOptions(
        name=f"DiT-{size}/{patch}" if size is not None and heads == known_heads else None,
        depth=depth,
        width=width,
        heads=heads,
        patch_size=patch,
        input_size=tuple(side * patch for side in _grid(weights["pos_embed"], patch, path, input_size)),
        in_channels=channels,
        num_classes=rows if rows == num_classes else rows - 1,
        null_class=rows != num_classes,
        learn_sigma=outputs == 2 * channels,
        time_scale=1.0,
        convention=family.convention,
        **{name: shown(weights) for name, shown in VARIANTS.items()},
    )


def _grid(table: Tensor, patch: int, path: Path, input_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of tokens that a position table [1, T, h] is for.

    They are inferred from a sine-cosine table; any other table is for `input_size` if that has as many tokens, or
    else square.
    """
    tokens, dim = table.shape[1:]
    divisors = [rows for rows in range(1, tokens + 1) if tokens % rows == 0]
    grids = sorted(((rows, tokens // rows) for rows in divisors), key=lambda grid: abs(math.log(grid[0] / grid[1])))
    for grid in grids:
        if dim % 4 == 0 and torch.allclose(table.float(), sincos_position_table(*grid, dim), rtol=0, atol=4e-3):
            return grid
    if input_size is not None:
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if (height // patch) * (width // patch) == tokens:
            return height // patch, width // patch
    if math.isqrt(tokens) ** 2 != tokens:
        raise UserError(f"{path} has {tokens} learned positions, not a square number; give its input_size in training")
    return grids[0]


def _check_wanted(options: DiTOptions, path: Path, in_channels: int | None, num_classes: int | None) -> None:
    if in_channels is not None and options.in_channels != in_channels:
        raise UserError(
            f"{path} is for latents of {options.in_channels} channels, not {in_channels}: use the tokenizer it was "
            f"trained with (in_channels={options.in_channels}), or another checkpoint"
        )
    if num_classes is not None and options.num_classes != num_classes:
        raise UserError(
            f"{path} has {options.num_classes} classes, not {num_classes}: sample it with its own "
            f"(num_classes={options.num_classes}), or train another label table (model.reset_labels=true)"
        )
