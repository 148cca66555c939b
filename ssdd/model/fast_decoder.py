"""The fast decoders (F family): convolutions on the grid of the latent, at 1/20 of a KL-VAE decoder's FLOP or less.

A linear map from the latent to pixels gives a base image; the network adds what is missing, given the noisy image, the
latent and the time. Nearly all of its work is done on the grid at 1/8 of the image, in blocks that look one cell far:
there is no attention and no statistic over positions, so what a pixel depends on ends at a finite halo, and tiles with
that halo reproduce the whole image. With r_t = x_t - (1 - t) base, D = (1 - t)^2 s^2 + t^2 and F the network's output

    v = base + ((1 - t) s^2 - t) / D r_t + s / sqrt(D) F,

so that F = 0 is the best linear estimate for a residual of deviation s; nothing is divided by t. At a given t all that
depends on it is a constant of the weights (`FastDecoder.fold`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd.engine.errors import UserError
from ssdd.engine.recompute import run_block
from ssdd.model.convolution_blocks import BLOCKS, DepthwiseBlock, PlainBlock, ShuffleUp
from ssdd.model.flow import at_least_float32, common_batch, expand_time
from ssdd.model.layers import TimeEmbedding

TRUNK_STRIDE = 8
TIME_CHANNELS = 64
PREDICTIONS = ("residual", "x")
X_FLOOR = 0.05
"""Smallest divisor where the network predicts the image."""


@dataclass(frozen=True)
class FastSize:
    """Widths and depths of a fast decoder."""

    width: int
    """Channels of the trunk, at 1/8 of the image."""
    depth: int
    """Blocks of the trunk."""
    thin: tuple[int, int, int]
    """Channels at 1/4, 1/2 and 1/1 of the image."""
    coarse_depth: int = 2
    """Blocks on every grid coarser than the trunk's, for latents with a stride above 8."""
    expansion: int = 3
    """Hidden channels of a depthwise block, in widths."""
    trunk: str = "depthwise"
    """depthwise or plain: the kind of `ssdd.model.convolution_blocks` that the trunk consists of."""
    prediction: str = "residual"
    """residual: the formula of this module; x: base + F is the image x, and v = (x - x_t) / max(t, floor)."""
    residual_std: float = 0.5
    """s, the deviation of what the base image lacks."""
    statistics: bool = False
    """Also take mean and deviation of each channel of the whole latent, the same for every tile."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "thin", tuple(self.thin))  # a file's JSON has lists
        for key, choices in (("trunk", tuple(BLOCKS)), ("prediction", PREDICTIONS)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} must be one of {', '.join(choices)}")
        if self.residual_std <= 0:
            raise ValueError("residual_std must be positive")


def size_of_weights(weights: Mapping[str, Tensor]) -> str | dict[str, Any] | None:
    """The size of a decoder with these tensors, as `SSDD` takes it; None where they are not those of a `FastDecoder`.

    Tensors do not say what the network predicts, nor the residual's deviation: those are taken to be the defaults.
    """
    if "image_to_trunk.weight" not in weights:
        return None
    depth = len({key.split(".")[1] for key in weights if key.startswith("trunk.")})
    coarse = len({key.split(".")[2] for key in weights if key.startswith("coarse.0.")})
    trunk = "depthwise" if "trunk.0.expand.weight" in weights else "plain"
    found = FastSize(
        width=len(weights["stem.weight"]),
        depth=depth,
        thin=(
            len(weights["quarter_block.norm.weight"]),
            len(weights["half_block.norm.weight"]),
            len(weights["full_conv.weight"]),
        ),
        coarse_depth=coarse - 1 if coarse else FastSize.coarse_depth,
        expansion=len(weights["quarter_block.expand.weight"]) // len(weights["quarter_block.norm.weight"]),
        trunk=trunk,
        statistics="statistics.weight" in weights,
    )
    name = next((name for name, size in FAST_SIZES.items() if size == found), None)
    return name or {"size": next(iter(FAST_SIZES)), **vars(found), "thin": list(found.thin)}


FAST_SIZES = {
    "F-XS": FastSize(192, 8, (64, 32, 16)),
    "F-S": FastSize(288, 10, (96, 48, 24)),
    "F-B": FastSize(384, 12, (128, 64, 32)),
}


@dataclass
class FastCondition:
    """What a decode needs of its latent."""

    features: Tensor  # [B, width, H/8, W/8]
    base: Tensor  # float32 [B, 3, H, W]


class FastDecoder(nn.Module):
    """Velocity of an image given its latent and the time; no operation looks further than `halo` cells of the latent.

    stride: that of the latent, a power of two, else UserError. The linear base is zero until `set_base`.
    """

    recompute = False  # activations of the blocks in the backward pass; see ssdd.engine.recompute

    def __init__(self, size: FastSize, stride: int, z_dim: int):
        super().__init__()
        if stride & (stride - 1):
            raise UserError(f"fast decoders take latents whose stride is a power of two, got {stride}")
        self.size, self.stride, self.z_dim = size, stride, z_dim
        self.pixel_multiple = max(stride, TRUNK_STRIDE)
        self.token_blocks, self.token_width = size.depth, size.width
        width, (quarter, half, full) = size.width, size.thin
        make = BLOCKS[size.trunk]
        self.fold_in = max(1, TRUNK_STRIDE // stride)  # latent cells across a cell of the trunk
        self.base = nn.Conv2d(z_dim, 3 * stride**2, 1)
        self.stem = nn.Conv2d(z_dim * self.fold_in**2, width, 3, padding=1)
        self.statistics = nn.Linear(2 * z_dim, width) if size.statistics else None
        doublings = int(math.log2(max(1, stride // TRUNK_STRIDE)))
        self.coarse = nn.ModuleList(
            nn.ModuleList([*(make(width, size.expansion) for _ in range(size.coarse_depth)), ShuffleUp(width, width)])
            for _ in range(doublings)
        )
        self.time_embedding = TimeEmbedding(TIME_CHANNELS)
        self.modulation = nn.Linear(4 * TIME_CHANNELS, 2 * width * size.depth)
        self.image_to_trunk = nn.Conv2d(3 * TRUNK_STRIDE**2, width, 1)
        self.trunk = nn.ModuleList(make(width, size.expansion) for _ in range(size.depth))
        self.to_quarter, self.quarter_block = ShuffleUp(width, quarter), DepthwiseBlock(quarter, size.expansion)
        self.to_half, self.half_block = ShuffleUp(quarter, half), DepthwiseBlock(half, size.expansion)
        self.image_to_half = nn.Conv2d(12, half, 1)
        self.to_full, self.full_conv = ShuffleUp(half, full), nn.Conv2d(full, full, 3, padding=1)
        self.image_to_full = nn.Conv2d(3, full, 1)
        self.conv_out = nn.Conv2d(full, 3, 3, padding=1)
        self.folded_at: float | None = None
        self._compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None
        self.initialise()

    def initialise(self) -> None:
        """Unit gain through convolutions, small residual branches, zero output and zero modulation."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DepthwiseBlock | PlainBlock):
                module.project.weight.data.mul_(self.size.depth**-0.5)
            elif isinstance(module, ShuffleUp):
                module.initialise()
        for module in filter(None, (self.base, self.modulation, self.statistics, self.conv_out)):
            nn.init.zeros_(module.weight)

    @property
    def halo(self) -> int:
        """Cells of the latent that a pixel depends on, to each side of the cell that holds it, the larger one of latent
        and trunk. Every 3x3 convolution counts as one cell of its grid.
        """
        pixels = self.size.depth * TRUNK_STRIDE + 4 + 2 + 1 + 1
        pixels += self.fold_in * self.stride  # the stem
        pixels += sum(self.size.coarse_depth * TRUNK_STRIDE * 2**i for i in range(1, len(self.coarse) + 1))
        return -(-pixels // self.stride)

    @torch.no_grad()
    def set_base(self, weight: Tensor, bias: Tensor) -> None:
        """The linear map from a latent cell to its pixels: weight [3 f^2, z_dim], bias [3 f^2], in the order of
        `torch.nn.functional.pixel_unshuffle`.
        """
        self.base.weight.copy_(weight[:, :, None, None])
        self.base.bias.copy_(bias)

    def compile(self, **options: object) -> None:
        """torch.compile what runs at every step, in place."""
        self._compiled = torch.compile(self._velocity_and_tokens, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": None}  # a copy's would run these weights

    def condition(self, z: Tensor, height: int, width: int, whole: Tensor | None = None) -> FastCondition:
        """The part of a decode to height x width pixels that depends on z [B, z_dim, h, w] alone.

        whole: the whole image's latent, where z is a tile of it. ValueError if the sides do not fit or z has the wrong
        number of channels.
        """
        if height % self.pixel_multiple or width % self.pixel_multiple:
            raise ValueError(f"image sides must be multiples of {self.pixel_multiple}, got {height}x{width}")
        if z.shape[1] != self.z_dim or z.shape[2:] != (height // self.stride, width // self.stride):
            raise ValueError(f"a latent {list(z.shape)} does not fit {self.z_dim} channels and {height}x{width} pixels")
        z = z.to(self.stem.weight.dtype)
        base = F.pixel_shuffle(at_least_float32(self.base(z)), self.stride)
        h = self.stem(F.pixel_unshuffle(z, self.fold_in))
        if self.statistics is not None:
            whole = z if whole is None else whole.to(z.dtype)
            moments = torch.cat([whole.mean((2, 3)), whole.std((2, 3), correction=0)], dim=1)
            h = h + self.statistics(moments)[:, :, None, None]
        for blocks in self.coarse:
            for block in blocks:
                h = run_block(block, h, recompute=self.recompute)
        return FastCondition(h, base)

    def velocity(self, x_t: Tensor, t: Tensor, condition: FastCondition) -> Tensor:
        """v [B, 3, H, W] at image x_t and time t (scalar or [B]), float32 (float64 if x_t is)."""
        return self.velocity_and_tokens(x_t, t, condition)[0]

    def velocity_and_tokens(
        self, x_t: Tensor, t: Tensor, condition: FastCondition, keep: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """v, and the tokens [B, H/8, W/8, D] after block number `keep` of the trunk.

        One image stands for all where there are several z, and one z where there are several images. ValueError where
        their numbers, or that of the times, do not match.
        """
        common_batch(len(x_t), len(condition.base), t.numel())
        return (self._compiled or self._velocity_and_tokens)(x_t, t, condition, keep)

    def _velocity_and_tokens(
        self, x_t: Tensor, t: Tensor, condition: FastCondition, keep: int | None
    ) -> tuple[Tensor, Tensor | None]:
        x_t = at_least_float32(x_t)
        t, s = expand_time(t.to(x_t.dtype), x_t), self.size.residual_std
        deviation = ((1 - t) ** 2 * s**2 + t**2).sqrt()
        r = (x_t - (1 - t) * condition.base) / deviation  # of unit variance
        out, tokens = self._network(r.to(self.stem.weight.dtype), t, condition.features, keep)
        if self.size.prediction == "x":
            return (condition.base + out - x_t) / t.clamp(min=X_FLOOR), tokens
        return condition.base + ((1 - t) * s**2 - t) / deviation * r + s / deviation * out, tokens

    def _network(self, r: Tensor, t: Tensor, features: Tensor, keep: int | None) -> tuple[Tensor, Tensor | None]:
        h, kept = features + self.image_to_trunk(F.pixel_unshuffle(r, TRUNK_STRIDE)), None
        for i, (block, factors) in enumerate(zip(self.trunk, self._factors(t), strict=True)):
            h = run_block(block, h, *factors, recompute=self.recompute)
            kept = h if i == keep else kept
        h = self.quarter_block(self.to_quarter(h))
        h = self.half_block(self.to_half(h) + self.image_to_half(F.pixel_unshuffle(r, 2)))
        h = self.to_full(h) + self.image_to_full(r)
        out = at_least_float32(self.conv_out(F.silu(self.full_conv(F.silu(h)))))
        return out, None if kept is None else kept.permute(0, 2, 3, 1)

    def _factors(self, t: Tensor) -> list[tuple[Tensor, ...]]:
        """(scale, gate) of every block of the trunk, each [1 or B, C, 1, 1]; empty where the weights have them."""
        if self.folded_at is not None:
            return [()] * len(self.trunk)
        factors = 1 + self.modulation(F.silu(self.time_embedding(t)))[:, :, None, None]
        scales_and_gates = factors.chunk(2 * len(self.trunk), dim=1)
        return list(zip(scales_and_gates[::2], scales_and_gates[1::2], strict=True))

    @torch.no_grad()
    def fold(self, t: float = 1.0) -> FastDecoder:
        """A copy without modulation, a plain convolutional network; its velocities are right at this time alone."""
        folded = copy.deepcopy(self)
        factors = self._factors(torch.full((), t, device=self.stem.weight.device))
        for block, (scale, gate) in zip(folded.trunk, factors, strict=True):
            block.fold(scale, gate)
        folded.time_embedding, folded.modulation, folded.folded_at = None, None, t
        return folded

    def forward(self, x_t: Tensor, t: Tensor | float, z: Tensor) -> Tensor:
        """v = x - eps, float32 [B, 3, H, W], at x_t of that shape, t in [0, 1] (scalar or [B]), z [B, z_dim, h, w]."""
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device)
        return self.velocity(x_t, t, self.condition(z, *x_t.shape[-2:]))
