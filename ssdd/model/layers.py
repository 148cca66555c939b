"""Building blocks of the decoder: residual block, adaptive norms, time embedding, gated feed-forward, resampling.

Key names and the order of scale and shift are those of the published weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd.model.norms import (
    AdaGroupNorm,
    GroupNorm,
    add,
    affine,
    affine_of_group_norm,
    group_norm,
    modulate,
    overwritable,
    silu,
)

CACHED_VALUES = 1 << 20
"""Float32 maps of more values per image do not stay in the caches of a CPU."""


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

    def sharded(self) -> list[nn.Module]:
        """See `ssdd.engine.sharding`; norm1 is read by the decoder's `condition`."""
        return [part for part in self.children() if part is not self.norm1]

    def forward(self, x: Tensor, temb: Tensor, modulation: Tensor, skip: Tensor | None = None) -> Tensor:
        """x and, after it in the channels, the skip connection: [B, Cin, H, W] together.

        temb = SiLU(time embedding) [1 or B, 4 C], modulation from `norm1.condition`. Where there is a skip connection,
        this is the last use of both maps, and may overwrite them.
        """
        if overwritable() and _large(x):
            return self._overwriting(x, temb, modulation, skip)
        x = x if skip is None else torch.cat([x, skip], dim=1)
        h = self.conv1(silu(self.norm1(x, modulation)))
        h = self.conv2(silu(self._norm2_at(h, temb)))
        x = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return add(h, x)

    def _overwriting(self, x: Tensor, temb: Tensor, modulation: Tensor, skip: Tensor | None) -> Tensor:
        """`forward` in few passes and few new buffers, which is what large maps on a CPU need.

        Norms and modulations are one affine map each, in place where possible. The convolutions of x and skip, instead
        of one of both together, avoid concatenating them.
        """
        parts = [x] if skip is None else [x, skip]
        scale, shift = modulation.chunk(2, dim=1)
        gain, offset = affine_of_group_norm(parts, self.norm1.groups, 1 + scale, shift, self.norm1.eps)
        shortcut = self._sum_of_parts(self.conv_shortcut, parts) if hasattr(self, "conv_shortcut") else x
        sizes = [part.shape[1] for part in parts]
        affines = zip(parts, gain.split(sizes, 1), offset.split(sizes, 1), strict=True)
        parts = [silu(affine(part, *maps, out=None if skip is None else part)) for part, *maps in affines]
        h = self._sum_of_parts(self.conv1, parts)

        scale, shift = self.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)
        weight, bias = (p[None, :, None, None] for p in (self.norm2.weight, self.norm2.bias))
        gain, offset = weight * (1 + scale), bias * (1 + scale) + shift
        gain, offset = affine_of_group_norm([h], self.norm2.num_groups, gain, offset, self.norm2.eps)
        return self.conv2(silu(affine(h, gain, offset, out=h))).add_(shortcut)

    @staticmethod
    def _sum_of_parts(conv: nn.Conv2d, parts: list[Tensor]) -> Tensor:
        """The convolution of parts that follow each other in the channels."""
        if len(parts) == 1:
            return conv(parts[0])
        weights = conv.weight.split([part.shape[1] for part in parts], dim=1)
        h = F.conv2d(parts[0], weights[0], conv.bias, padding=conv.padding)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            h += F.conv2d(part, weight, padding=conv.padding)
        return h

    def _norm2_at(self, h: Tensor, temb: Tensor) -> Tensor:
        """norm2(h) (1 + scale) + shift; one time for all images becomes part of the norm's own affine map."""
        norm, (scale, shift) = self.norm2, self.time_emb_proj(temb).chunk(2, dim=1)
        if len(temb) > 1:
            return modulate(norm(h), scale[:, :, None, None], shift[:, :, None, None])
        weight, bias = norm.weight * (1 + scale[0]), norm.bias * (1 + scale[0]) + shift[0]
        return group_norm(h, norm.num_groups, weight, bias, norm.eps)


def _large(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x[0].numel() > CACHED_VALUES


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

        On the doubled grid, taps that fall on the same pixel of x are one: 16 instead of 36 products per pixel of x.
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
