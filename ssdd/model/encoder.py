"""The KL encoder of latent diffusion models (LDM, Rombach et al. 2022), at any stride f4..f64 and any channel count.

Its keys are the LDM names, so LDM and SD-VAE encoder weights map one to one (quant_conv is `out_proj` here).
"""

from __future__ import annotations

import math
import re

import torch.nn.functional as F
from torch import Tensor, nn

from ssdd.engine.recompute import run_block
from ssdd.model.norms import GroupNorm, add, silu

ENCODER_NAME = re.compile(r"f(\d+)c(\d+)")


def parse_encoder_name(name: str) -> tuple[int, int]:
    """ "f8c4" -> (8, 4): stride and latent channels. ValueError for anything else."""
    match = ENCODER_NAME.fullmatch(name)
    stride, channels = (int(n) for n in match.groups()) if match else (0, 0)
    if stride not in (4, 8, 16, 32, 64) or channels < 1:
        raise ValueError(f"encoder {name!r} is not f<stride>c<channels> with stride 4, 8, 16, 32 or 64, such as f8c4")
    return stride, channels


PUBLISHED_WIDTH = 64
"""From this width on, group norms and initialisation are the published ones; narrower encoders are ours."""


def groups_of(width: int) -> int:
    return 32 if width >= PUBLISHED_WIDTH else max(1, width // 4)


class EncoderBlock(nn.Module):
    """Two normalised convolutions around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def sharded(self) -> list[nn.Module]:
        """See `ssdd.engine.sharding`."""
        return [self]

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        x = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return add(h, x)


class EncoderAttention(nn.Module):
    """Global single-head attention with 1x1 convolutions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def sharded(self) -> list[nn.Module]:
        """See `ssdd.engine.sharding`."""
        return [self]

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))  # [B, 1, N, C]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.proj_out(h)


class EncoderDownsample(nn.Module):
    """Stride-2 convolution, padded on the right and the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class EncoderLevel(nn.Module):
    """Two blocks at one resolution and, but for the last level, a downsampling."""

    recompute = False  # activations of the blocks in the backward pass; see ssdd.engine.recompute

    def __init__(self, in_channels: int, out_channels: int, groups: int, downsample: bool):
        super().__init__()
        self.block = nn.ModuleList(
            [EncoderBlock(in_channels, out_channels, groups), EncoderBlock(out_channels, out_channels, groups)]
        )
        if downsample:
            self.downsample = EncoderDownsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = run_block(block, x, recompute=self.recompute)
        return self.downsample(x) if hasattr(self, "downsample") else x


class EncoderMiddle(nn.Module):
    """Block, attention, block at the latent resolution."""

    recompute = False  # activations of the blocks in the backward pass; see ssdd.engine.recompute

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = EncoderBlock(channels, channels, groups)
        self.attn_1 = EncoderAttention(channels, groups)
        self.block_2 = EncoderBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block_1, self.attn_1, self.block_2):
            x = run_block(block, x, recompute=self.recompute)
        return x


class Encoder(nn.Module):
    """Image [B, 3, H, W] in [-1, 1] -> posterior parameters [B, 2c, H/f, W/f] (mean | log variance)."""

    def __init__(self, stride: int, z_dim: int, width: int = 128):
        super().__init__()
        self.f, self.z_dim, self.width = stride, z_dim, width
        groups = groups_of(width)
        widths = [width * m for m in [1, 2] + [4] * (int(math.log2(stride)) - 1)]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(
            EncoderLevel(c_in, c_out, groups, downsample=i < len(widths) - 1)
            for i, (c_in, c_out) in enumerate(zip([width, *widths], widths, strict=False))
        )
        self.mid = EncoderMiddle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_dim, 3, padding=1)
        self.out_proj = nn.Conv2d(2 * z_dim, 2 * z_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.out_proj(self.conv_out(silu(self.norm_out(self.mid(h)))))

    def initialise(self, posterior_std: float = 1.0) -> None:
        """For an encoder that is going to be trained: convolutions N(0, 0.02^2), zero bias, as in SSDD's code.

        Narrow encoders take fan_in^-1/2 instead of 0.02, or no signal would pass. `posterior_std` is what the
        posterior's deviation starts at.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=0.02 if self.width >= PUBLISHED_WIDTH else fan_in**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.out_proj.bias[self.z_dim :], 2 * math.log(posterior_std))
