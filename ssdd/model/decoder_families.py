"""The architectures of the decoder, one table: a family of sizes that are built, described and recognised alike.

A decoder is a module with these attributes:

- pixel_multiple: the sides of its images are multiples of it and of the latent's stride;
- token_blocks, token_width, of those that take steps: blocks after which it can keep tokens, and the tokens' channels;
  0 where it has none.

A decoder without steps maps z [B, c, h, w] to the image in `forward`. The others are velocity fields: `condition(z,
height, width)` is what depends on z alone, `velocity(x_t, t, condition)` is v [B, 3, H, W] float32 at times t, a scalar
or [B], and `velocity_and_tokens(x_t, t, condition, keep)` also gives the tokens [B, H/8, W/8, D] after block `keep`.
What recomputation and sharding ask of its blocks stands in `ssdd.engine.recompute` and `ssdd.engine.sharding`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from ssdd.engine.errors import UserError
from ssdd.model import decoder as uvit
from ssdd.model import kl_decoder as kl_vae

PREFIX = "decoder."
"""How the names of a decoder's tensors begin in a tokenizer's file."""
TOKEN_STRIDE = 8
"""Pixels between the tokens of a decoder that has some."""


@dataclass(frozen=True)
class DecoderFamily:
    """An entry of `DECODERS`."""

    sizes: Mapping[str, Any]
    """Name of a size -> its description, a frozen dataclass whose ValueError says what is impossible."""
    build: Callable[[Any, int, int], nn.Module]
    """(description, stride and channels of the latent) -> the network."""
    size_of_weights: Callable[[Mapping[str, Tensor]], str | dict[str, Any] | None]
    """Tensors of a network -> its size, as `parse_decoder` takes it; None where they are another family's."""
    most_steps: int | None = None
    """0: deterministic, takes neither noise nor steps. 1: one step from noise to the image. None: any number."""
    of_encoder_width: bool = False
    """Whether a training config gives it the width of the encoder."""


UVIT = DecoderFamily(uvit.DECODER_SIZES, lambda size, f, z_dim: uvit.UViTDecoder(size, z_dim), uvit.size_of_weights)
KL_VAE = DecoderFamily(
    kl_vae.KL_SIZES,
    lambda size, f, z_dim: kl_vae.KLDecoder(f, z_dim, size.width),
    kl_vae.size_of_weights,
    most_steps=0,
    of_encoder_width=True,
)
DECODERS = {"U-ViT": UVIT, "KL-VAE": KL_VAE}
"""Every architecture; one is added here alone."""


def decoder_names() -> list[str]:
    """The sizes of all families."""
    return [name for family in DECODERS.values() for name in family.sizes]


def family_of(name: str) -> DecoderFamily:
    """The family that has a size of this name. UserError for an unknown name."""
    for family in DECODERS.values():
        if name in family.sizes:
            return family
    raise UserError(f"decoder size {name!r} is unknown; the sizes are {', '.join(decoder_names())}")


def parse_decoder(decoder: str | Mapping[str, Any]) -> tuple[DecoderFamily, Any]:
    """Family and description of a decoder given as "M", as {"size": "M", "window": 8}, or as all fields of a U-ViT.

    Fields besides `size` replace those of that size. UserError for unknown names and impossible numbers.
    """
    options = {"size": decoder} if isinstance(decoder, str) else dict(decoder)
    name = options.pop("size", None)
    family = UVIT if name is None else family_of(name)
    known = [entry.name for entry in fields(next(iter(family.sizes.values())))]
    try:
        return family, uvit.DecoderSize(**options) if name is None else replace(family.sizes[name], **options)
    except TypeError:
        unknown = [key for key in options if key not in known]
        problem = f"unknown keys {', '.join(unknown)}; " if unknown else ""
        raise UserError(
            f"decoder {decoder}: {problem}expected some of the keys {', '.join(['size', *known])}"
        ) from None
    except ValueError as error:
        raise UserError(f"decoder {decoder!r}: {error}") from None


def decoder_of_weights(weights: Mapping[str, Tensor]) -> str | dict[str, Any] | None:
    """The decoder in a tokenizer's tensors, as `parse_decoder` takes it; None where there is none that is known."""
    own = {key.removeprefix(PREFIX): value for key, value in weights.items() if key.startswith(PREFIX)}
    found = (family.size_of_weights(own) for family in DECODERS.values())
    return next((size for size in found if size is not None), None)
