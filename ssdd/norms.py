"""Group and layer norms with float32 statistics and arithmetic, their modulation, and what overwrites their results.

On a CPU the pages of a new buffer can cost as much as the arithmetic that fills it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd.group_norm_op import group_norm_op


def overwritable() -> bool:
    """Whether a result may take the memory of a fresh activation: no gradient needs it, and no compiler fuses both."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def silu(x: Tensor) -> Tensor:
    """SiLU of a fresh activation, which it may overwrite."""
    return F.silu(x, inplace=overwritable())


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (1 + scale) + shift of a fresh activation x [B, C, H, W], which it may overwrite.

    scale and shift [1 or B, C, h, w] are constant over (H/h) x (W/w) blocks.
    """
    h, w = scale.shape[-2:]
    blocks = x.unflatten(3, (w, -1)).unflatten(2, (h, -1))  # [B, C, h, H/h, w, W/w], a view
    scale, shift = (m[:, :, :, None, :, None] for m in (scale, shift))
    if overwritable():
        torch.addcmul(shift, blocks, 1 + scale, out=blocks)
        return x
    return torch.addcmul(shift, blocks, 1 + scale).flatten(4, 5).flatten(2, 3)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """x [B, C, H, W], normalised over groups of channels, times weight [C] plus bias [C]; of x's dtype."""
    if x.device.type == "cpu":  # its kernel computes in float32 inside
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return group_norm_op(x, weight, bias, groups, eps)[0]
        return F.group_norm(x, groups, weight, bias, eps)
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return F.group_norm(x.float(), groups, weight, bias, eps).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with float32 statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class AdaGroupNorm(nn.Module):
    """Group norm without affine, then (1 + scale) and shift projected from the latent context at the latent grid."""

    def __init__(self, channels: int, ctx_channels: int, groups: int, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.ctx_proj = nn.Conv2d(ctx_channels, 2 * channels, 1)

    def condition(self, ctx: Tensor, height: int, width: int) -> Tensor:
        """Modulation [B, 2 C, h, w] for a feature map of height x width; depends on z alone."""
        return self.ctx_proj(resize_to(ctx, height, width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=1)
        return modulate(group_norm(x, self.groups, eps=self.eps), scale, shift)


class AdaLayerNorm(nn.Module):
    """Layer norm without affine over channels, then (1 + scale) and shift (order: shift, scale) from the context."""

    def __init__(self, channels: int, ctx_channels: int):
        super().__init__()
        self.linear = nn.Linear(ctx_channels, 2 * channels)

    def condition(self, ctx: Tensor, height: int, width: int) -> Tensor:
        """Modulation [B, h, 1, w, 1, 2 D] for a token grid height x width; depends on z alone."""
        ctx = resize_to(ctx, height, width).permute(0, 2, 3, 1)  # [B, h, w, C]
        return self.linear(F.silu(ctx))[:, :, None, :, None]

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, H, W, D]."""
        shift, scale = modulation.chunk(2, dim=-1)
        y = F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)
        blocks = y.unflatten(2, (scale.shape[3], -1)).unflatten(1, (scale.shape[1], -1))
        return torch.addcmul(shift, blocks, 1 + scale).flatten(3, 4).flatten(1, 2)


def resize_to(latent_map: Tensor, height: int, width: int) -> Tensor:
    """Nearest neighbours of a latent-grid map on a grid that is coarser or no integer multiple; else the map itself.

    A finer grid that divides evenly is left to broadcasting in `modulate`, so nothing of pixel size is materialised.
    """
    h, w = latent_map.shape[-2:]
    if height % h == 0 and width % w == 0:
        return latent_map
    return F.interpolate(latent_map, size=(height, width), mode="nearest")
