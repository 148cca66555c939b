"""Convolutional blocks that look one cell far: a norm over channels, two residual blocks, an upsampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """Every position of x [B, C, H, W] by its root mean square over the channels, times a learned gain."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = F.rms_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.weight.to(x.dtype), 1e-6)
        return rows.permute(0, 3, 1, 2)


class DepthwiseBlock(nn.Module):
    """x + gate W2 GELU(W1 (scale norm(depthwise 3x3 of x))); scale and gate [1 or B, C, 1, 1], or none of them."""

    def __init__(self, channels: int, expansion: int):
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = RmsNorm(channels)
        self.expand = nn.Conv2d(channels, expansion * channels, 1)
        self.project = nn.Conv2d(expansion * channels, channels, 1)

    def forward(self, x: Tensor, scale: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        h = self.norm(self.spatial(x))
        h = self.project(F.gelu(self.expand(h if scale is None else h * scale)))
        return x + h if gate is None else torch.addcmul(x, h, gate)

    def sharded(self) -> list[nn.Module]:
        """See `ssdd.engine.sharding`."""
        return [self]

    def fold(self, scale: Tensor, gate: Tensor) -> None:
        """Take constant factors [1, C, 1, 1] into the weights."""
        self.norm.weight.mul_(scale.flatten())
        self.project.weight.mul_(gate.view(-1, 1, 1, 1))
        self.project.bias.mul_(gate.flatten())


class PlainBlock(nn.Module):
    """x + gate W2 GELU(3x3 of scale norm(x)); scale and gate [1 or B, C, 1, 1], or none of them."""

    def __init__(self, channels: int, expansion: int):
        super().__init__()
        self.norm = RmsNorm(channels)
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, scale: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        h = self.project(F.gelu(self.spatial(h if scale is None else h * scale)))
        return x + h if gate is None else torch.addcmul(x, h, gate)

    sharded, fold = DepthwiseBlock.sharded, DepthwiseBlock.fold


BLOCKS = {"depthwise": DepthwiseBlock, "plain": PlainBlock}


class ShuffleUp(nn.Module):
    """1x1 convolution and pixel shuffle to a grid twice as fine.

    The four sub-pixels start with equal weights (ICNR, Aitken et al. 2017): a flat area stays flat.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * out_channels, 1)

    def initialise(self) -> None:
        equal = self.conv.weight[::4].repeat_interleave(4, dim=0)
        with torch.no_grad():
            self.conv.weight.copy_(equal)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)
