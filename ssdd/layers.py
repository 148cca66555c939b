"""Building blocks of the decoder: residual block, adaptive norms, time embedding, gated feed-forward, resampling.

Key names and the order of scale and shift are those of the published weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd.group_norm import GroupNorm, group_norm


def overwritable() -> bool:
    """Whether a result may take the memory of a fresh activation: no gradient needs that, and no compiler fuses both.

    On a CPU the pages of a new buffer cost as much as the arithmetic that fills it.
    """
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def silu(x: Tensor) -> Tensor:
    """SiLU of a fresh activation, see `overwritable`."""
    return F.silu(x, inplace=overwritable())


def resize_to(latent_map: Tensor, height: int, width: int) -> Tensor:
    """Nearest neighbours of a latent-grid map on a grid that is coarser or no integer multiple; else the map itself.

    A finer grid that divides evenly is left to broadcasting in `modulate`, so nothing of pixel size is materialised.
    """
    h, w = latent_map.shape[-2:]
    if height % h == 0 and width % w == 0:
        return latent_map
    return F.interpolate(latent_map, size=(height, width), mode="nearest")


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (1 + scale) + shift; x [B, C, H, W], scale and shift [B, C, h, w] constant over (H/h) x (W/w) blocks.

    x is a fresh activation, see `overwritable`.
    """
    h, w = scale.shape[-2:]
    blocks = x.unflatten(3, (w, -1)).unflatten(2, (h, -1))  # [B, C, h, H/h, w, W/w], a view
    scale, shift = (m[:, :, :, None, :, None] for m in (scale, shift))
    if overwritable():
        torch.addcmul(shift, blocks, 1 + scale, out=blocks)
        return x
    return torch.addcmul(shift, blocks, 1 + scale).flatten(4, 5).flatten(2, 3)


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, [cos | sin], through two linear layers: t scalar or [B] in [0, 1] -> [1 or B, 4 C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        half = self.channels // 2
        frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10_000) / half))
        angles = 1000 * t.float().reshape(-1, 1) * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


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


class ResnetBlock(nn.Module):
    """Residual block: z enters at the first norm, t at the second."""

    def __init__(self, in_channels: int, out_channels: int, ctx_channels: int, temb_channels: int, groups: int):
        super().__init__()
        self.norm1 = AdaGroupNorm(in_channels, ctx_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, 2 * out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor, modulation: Tensor) -> Tensor:
        """x [B, Cin, H, W], temb = SiLU(time embedding) [1 or B, 4 C], modulation from `norm1.condition`."""
        h = self.conv1(silu(self.norm1(x, modulation)))
        h = self.conv2(silu(self._norm2_at(h, temb)))
        x = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return h.add_(x) if overwritable() else h + x

    def _norm2_at(self, h: Tensor, temb: Tensor) -> Tensor:
        """norm2(h) (1 + scale) + shift; one time for all images becomes part of the norm's own affine map."""
        scale, shift = self.time_emb_proj(temb).chunk(2, dim=1)
        if len(temb) > 1:
            return modulate(self.norm2(h), scale[:, :, None, None], shift[:, :, None, None])
        weight, bias = self.norm2.weight * (1 + scale[0]), self.norm2.bias * (1 + scale[0]) + shift[0]
        return group_norm(h, self.norm2.num_groups, weight, bias, self.norm2.eps)


class Downsample(nn.Module):
    """Halve the grid with a stride-2 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the grid by nearest neighbours, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2 H, 2 W]."""
        if torch.is_grad_enabled():
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        phases = F.conv2d(x, self._phase_weights(), self.conv.bias.repeat(4), padding=1)
        phases = phases.unflatten(1, (2, 2, -1))  # [B, row, column, C, H + 1, W + 1]
        height, width = x.shape[-2:]
        out = phases.new_empty(len(x), height, 2, width, 2, phases.shape[3])
        for i in (0, 1):
            for j in (0, 1):
                phase = phases[:, i, j, :, i : i + height, j : j + width]
                out[:, :, i, :, j] = phase.permute(0, 2, 3, 1)
        return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    def _phase_weights(self) -> Tensor:
        """[4 C, C, 2, 2]: what the kernel is to pixels of even and odd row and column, each of which sees 2 x 2 of x.

        On the doubled grid, taps that fall on the same pixel of x are one: 16 instead of 36 products a pixel of x.
        """

        def halves(weight: Tensor, axis: int) -> Tensor:  # even: [w0, w1 + w2], odd: [w0 + w1, w2]
            first, middle, last = weight.split(1, dim=axis)
            even, odd = [first, middle + last], [first + middle, last]
            return torch.stack([torch.cat(taps, dim=axis) for taps in (even, odd)])

        weights = halves(halves(self.conv.weight, 2), 4)  # [column, row, C, C, 2, 2]
        return weights.transpose(0, 1).flatten(0, 2).contiguous(memory_format=torch.channels_last)


class GEGLU(nn.Module):
    """value * GELU(gate), both halves of one projection (Shazeer 2020)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Linear(GEGLU(x)) with inner width 4 D."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj_in_act = GEGLU(channels, 4 * channels)
        self.proj_out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in_act(x))


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
