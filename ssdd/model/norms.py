"""Group and layer norms with float32 statistics and arithmetic, their modulation, and what overwrites their results.

On a CPU the pages of a new buffer can cost as much as the arithmetic that fills it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd.model.group_norm_op import group_norm_op


def overwritable() -> bool:
    """Whether a result may take the memory of a fresh activation: no gradient needs it, and no compiler fuses both."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def silu(x: Tensor) -> Tensor:
    """SiLU of a fresh activation, which it may overwrite."""
    return F.silu(x, inplace=overwritable())


def add(x: Tensor, other: Tensor) -> Tensor:
    """x + other of a fresh activation x, which it may overwrite."""
    return x.add_(other) if overwritable() else x + other


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (1 + scale) + shift of a fresh activation, as `affine`."""
    return affine(x, 1 + scale, shift, x if overwritable() else None)


def affine(x: Tensor, gain: Tensor, offset: Tensor, out: Tensor | None = None) -> Tensor:
    """gain x + offset; x [B, C, H, W], gain and offset [1 or B, C, h, w] constant over (H/h) x (W/w) blocks.

    `out`, of the shape of x, takes the result; it may be x.
    """
    gain, offset = (m[:, :, :, None, :, None] for m in (gain, offset))

    def blocks(x: Tensor) -> Tensor:  # [B, C, h, H/h, w, W/w], a view
        return x.unflatten(3, (gain.shape[4], -1)).unflatten(2, (gain.shape[2], -1))

    if out is None:
        return torch.addcmul(offset, blocks(x), gain).flatten(4, 5).flatten(2, 3)
    torch.addcmul(offset, blocks(x), gain, out=blocks(out))
    return out


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


def affine_of_group_norm(
    parts: Sequence[Tensor], groups: int, gain: Tensor, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(a, b) such that a x + b is gain times the group norm of x, plus offset.

    x is `parts` [B, Ci, H, W], one after the other in the channels, which need not be put together. a, b, gain and
    offset [1 or B, C, h, w] are constant over blocks.
    """
    moments = [_channel_moments(part) for part in parts]
    mean, var = (torch.cat(one, dim=1).unflatten(1, (groups, -1)) for one in zip(*moments, strict=True))
    var = var.mean(2, keepdim=True) + mean.var(2, correction=0, keepdim=True)  # within channels, and between them
    std, mean = (var + eps).sqrt().expand_as(mean), mean.mean(2, keepdim=True).expand_as(mean)
    gain = gain / std.flatten(1)[:, :, None, None]
    return gain, offset - gain * mean.flatten(1)[:, :, None, None]


def _channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, C] of the channels of x [B, C, H, W]."""
    moments = [torch.batch_norm_update_stats(image, None, None, 0.0) for image in x.split(1)]
    return tuple(torch.stack(one) for one in zip(*moments, strict=True))


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
    """Nearest neighbours of a latent-grid map on a grid that is coarser or not an integer multiple; else the map
    itself.

    A finer grid that divides evenly is left to broadcasting in `modulate`, so nothing of pixel size is materialised.
    """
    h, w = latent_map.shape[-2:]
    if height % h == 0 and width % w == 0:
        return latent_map
    return F.interpolate(latent_map, size=(height, width), mode="nearest")
