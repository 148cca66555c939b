"""The baseline decoder: that of LDM's KL-VAE (Rombach et al. 2022), deterministic; the paper's baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ssdd.engine.recompute import run_block
from ssdd.model.encoder import EncoderBlock, EncoderMiddle, groups_of
from ssdd.model.layers import Upsample
from ssdd.model.norms import GroupNorm, silu

RESNETS_A_LEVEL = 3
KL = "kl"


@dataclass(frozen=True)
class KLSize:
    """Width of a KL-VAE's decoder."""

    width: int = 128
    """Channels of the finest level; 128 is the published one."""


KL_SIZES = {KL: KLSize()}


def size_of_weights(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The size of a decoder with these tensors, as `SSDD` takes it; None where they are not those of a `KLDecoder`."""
    if not {"post_quant_conv.weight", "norm_out.weight"} <= set(weights):
        return None
    return {"size": KL, "width": len(weights["norm_out.weight"])}


class KLDecoder(nn.Module):
    """Latent [B, c, h, w] -> image [B, 3, h f, w f], about [-1, 1]; mirrors the encoder, names as in LDM."""

    recompute = False  # activations of the blocks in the backward pass; see ssdd.engine.recompute
    pixel_multiple = 1

    def __init__(self, stride: int, z_dim: int, width: int = 128):
        super().__init__()
        self.z_dim = z_dim
        groups = groups_of(width)
        widths = [width * m for m in [1, 2] + [4] * (int(math.log2(stride)) - 1)]
        self.post_quant_conv = nn.Conv2d(z_dim, z_dim, 1)
        self.conv_in = nn.Conv2d(z_dim, widths[-1], 3, padding=1)
        self.mid = EncoderMiddle(widths[-1], groups)
        self.up = nn.ModuleList()  # finest level first, as in LDM; used from the last to the first
        above = [*widths[1:], widths[-1]]
        for i, (c_in, c_out) in enumerate(zip(above, widths, strict=True)):
            level = nn.Module()
            level.block = nn.ModuleList(
                EncoderBlock(c_in if j == 0 else c_out, c_out, groups) for j in range(RESNETS_A_LEVEL)
            )
            if i > 0:
                level.upsample = Upsample(c_out)
            self.up.append(level)
        self.norm_out = GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(self.post_quant_conv(z.to(self.conv_in.weight.dtype))))
        for level in reversed(self.up):
            for block in level.block:
                h = run_block(block, h, recompute=self.recompute)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(silu(self.norm_out(h))).float()
