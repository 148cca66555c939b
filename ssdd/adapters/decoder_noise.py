"""Decoder noise for callers that know of none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]


def decoder_noise(shape: tuple[int, ...], seed: int, generator: Generators | None = None) -> Tensor:
    """Noise [B, 3, H, W] from a generator, or one for each image; without any, that of `seed`, equal for all images.

    So an image depends on its latent alone, whatever batch it is decoded in. ValueError when a list of generators has
    another length than the batch.
    """
    if generator is None:
        one = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(seed))
        return one.expand(shape)
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=generator.device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]} images")
    return torch.cat([torch.randn(1, *shape[1:], generator=g, device=g.device) for g in generator])
