"""Weights files of tokenizers: this project's, the official ones, and the KL encoders of LDM and diffusers.

Nothing in a file is ever executed: `.safetensors`, and torch files read with `weights_only`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.pretrained import read_torch_file
from ssdd.model.decoder_families import decoder_of_weights

log = logging.getLogger(__name__)
Weights = dict[str, Tensor]


def read_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """Tensors and metadata of a weights file. UserError if it cannot be read whole."""
    if path.suffix == ".safetensors":
        check_regular(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a complete safetensors file: {error}") from None
    content = read_torch_file(path, "a file of plain tensors")
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} is not a state dict: expected named tensors, perhaps below 'state_dict'")
    return content, {}


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path, strict: bool = True) -> None:
    """Load weights by name; on any difference in names or shapes nothing is loaded and one UserError lists what
    differs.

    The error names the networks that the weights would fit. strict=False loads what fits and logs the rest.
    """
    expected = module.state_dict()
    problems = [f"lacks {key}" for key in expected if key not in weights]
    problems += [f"has {key}, which this network does not" for key in weights if key not in expected]
    unlike = [key for key in expected if key in weights and weights[key].shape != expected[key].shape]
    problems += [f"{key} is {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}" for key in unlike]
    if problems:
        more = f" (and {len(problems) - 5} more differences)" if len(problems) > 5 else ""
        message = f"{source} does not fit this network: it {'; '.join(problems[:5])}{more}"
        if strict:
            fitting = options_of(weights)
            hint = ", ".join(f"{name}={value!r}" for name, value in fitting.items())
            raise UserError(f"{message}. These weights fit {hint}" if fitting else message)
        log.warning("%s; loaded the tensors that fit", message)
    fit = {key: value for key, value in weights.items() if key in expected and key not in unlike}
    module.load_state_dict(fit, strict=strict)


def options_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"encoder": ..., "decoder": ...} as `SSDD` takes them, read off the names and shapes of official or our tensors.

    What cannot be inferred is missing.
    """
    found: dict[str, Any] = {}
    prefix = "" if "out_proj.weight" in weights and "mid.attn_1.q.weight" in weights else "encoder."
    if {f"{prefix}conv_in.weight", f"{prefix}out_proj.weight"} <= set(weights):
        levels = _count(weights, rf"{re.escape(prefix)}down\.(\d+)\.")
        channels, width = len(weights[f"{prefix}out_proj.weight"]) // 2, len(weights[f"{prefix}conv_in.weight"])
        name = f"f{2 ** (levels - 1)}c{channels}"
        found["encoder"] = name if width == 128 else {"name": name, "width": width}
    decoder = decoder_of_weights(weights)
    return found if decoder is None else found | {"decoder": decoder}


def encoder_weights(weights: Mapping[str, Tensor], source: Path) -> Weights:
    """The weights of our `Encoder` from a whole tokenizer, or from a KL-VAE under LDM's or diffusers' names.

    LDM's `quant_conv` is `out_proj` here; where a VAE has none, the identity stands in. UserError if there is no
    encoder in it.
    """
    prefix = next((p for p in ("first_stage_model.", "vae.", "") if f"{p}encoder.conv_in.weight" in weights), None)
    if prefix is None:
        raise UserError(f"{source} holds no encoder: no tensor is called encoder.conv_in.weight")
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    ours = {_encoder_name(key): value for key, value in own.items() if key.startswith(("encoder.", "quant_conv."))}
    for name in ("q", "k", "v", "proj_out"):  # diffusers has linear layers where LDM has 1x1 convolutions
        key = f"mid.attn_1.{name}.weight"
        if key in ours and ours[key].ndim == 2:
            ours[key] = ours[key][:, :, None, None]
    if "out_proj.weight" not in ours and "conv_out.weight" in ours:
        channels = len(ours["conv_out.weight"])
        ours |= {"out_proj.weight": torch.eye(channels)[:, :, None, None], "out_proj.bias": torch.zeros(channels)}
    return ours


OFFICIAL_LICENSE = "CC-BY-NC-4.0"


def license_of(weights: Mapping[str, Tensor], metadata: Mapping[str, str], ours: bool) -> str | None:
    """The licence that a file's weights come under: what it records, or that of the official SSDD weights.

    ours: whether the file carries our configuration; one in the published layout without it counts as official.
    """
    official = not ours and any(key.startswith("decoder.ada_ctx_proj.") for key in weights)
    return metadata.get("license") or (OFFICIAL_LICENSE if official else None)


DIFFUSERS_NAMES = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"attn_1\.group_norm\.", "attn_1.norm."),
    (r"attn_1\.(?:to_q|query)\.", "attn_1.q."),
    (r"attn_1\.(?:to_k|key)\.", "attn_1.k."),
    (r"attn_1\.(?:to_v|value)\.", "attn_1.v."),
    (r"attn_1\.(?:to_out\.0|proj_attn)\.", "attn_1.proj_out."),
    (r"conv_norm_out\.", "norm_out."),
)
"""diffusers' names of a KL encoder's parts (AutoencoderKL, new and old) -> LDM's, which are ours."""


def _encoder_name(key: str) -> str:
    if key.startswith("quant_conv."):
        return key.replace("quant_conv.", "out_proj.")
    key = key.removeprefix("encoder.")
    for theirs, ours in DIFFUSERS_NAMES:
        key = re.sub(theirs, ours, key)
    return key


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for key in weights if (match := re.match(pattern, key))), default=-1)
