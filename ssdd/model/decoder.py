"""The U-ViT decoder: velocity of the image x_t given the time t and the latent z (SSDD, arXiv 2510.04961).

Four convolutional levels down to 1/8, a transformer with local attention, four levels up. z enters the input, the
first norm of every residual block and the first norm of every transformer block; t the second norm of the residual
blocks only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdd.engine.recompute import run_block
from ssdd.model.attention import RelativePositionBias, WindowAttention, WindowGeometry
from ssdd.model.flow import common_batch
from ssdd.model.layers import Downsample, FeedForward, ResnetBlock, TimeEmbedding, Upsample
from ssdd.model.norms import AdaLayerNorm, GroupNorm, add, silu

DECODER_STRIDE = 8  # three halvings of the image
DEFAULT_WINDOW = 8


@dataclass(frozen=True)
class DecoderSize:
    """Widths and depth of a decoder. ValueError for heads that do not divide its channels."""

    window: int = field(default=DEFAULT_WINDOW, kw_only=True)
    """Side of the attention window, in tokens."""
    base: int
    """Channels of the first level before `multiples` and rounding up to a multiple of `groups`."""
    multiples: tuple[int, int, int, int]
    layers: int
    """Transformer blocks in the middle."""
    heads: int | None = None
    """Attention heads; None takes min(16, max(4, D // 64)) for a middle of D channels."""
    groups: int = 32
    """Groups of every group norm; the published sizes keep 32, our small one at least 64 values per group."""
    init_std: float | None = 0.02
    """Deviation of the convolutions at the start; None takes fan_in^-1/2, which narrow layers need to pass a signal."""

    def __post_init__(self) -> None:
        if self.levels[-1] % self.head_count:
            raise ValueError(f"{self.levels[-1]} channels do not divide into {self.head_count} heads")

    @property
    def levels(self) -> list[int]:
        """Channels of the four levels."""
        return [-(-self.base * m // self.groups) * self.groups for m in self.multiples]

    @property
    def head_count(self) -> int:
        """Attention heads of the middle."""
        return self.heads or min(16, max(4, self.levels[-1] // 64))


DECODER_SIZES = {
    "XXS": DecoderSize(32, (1, 1, 1, 2), layers=2, heads=2, groups=8, init_std=None),
    "XS": DecoderSize(32, (1, 2, 3, 3), layers=8, heads=4),
    "S": DecoderSize(48, (1, 2, 3, 3), layers=8, heads=4),
    "B": DecoderSize(64, (1, 2, 3, 3), layers=10),
    "M": DecoderSize(96, (1, 2, 3, 3), layers=12),
    "L": DecoderSize(96, (1, 2, 4, 4), layers=16),
    "XL": DecoderSize(128, (1, 2, 4, 4), layers=16),
    "H": DecoderSize(192, (1, 2, 4, 4), layers=16),
    "XH": DecoderSize(256, (1, 2, 4, 4), layers=16),
    "G": DecoderSize(384, (1, 2, 4, 4), layers=16),
}
"""XS..G are the published sizes; XXS is an addition, for quickstarts and tests on images of 16 to 32 px."""


def size_of_weights(weights: Mapping[str, Tensor]) -> str | dict[str, Any] | None:
    """The size of a decoder with these tensors, by their names and shapes, as `SSDD` takes it; None for others."""
    table = weights.get("mid_block.transformer_blocks.0.relative_position_bias.relative_bias_table")
    firsts = [weights.get(f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(4)]
    if table is None or table.ndim != 3 or any(first is None for first in firsts):
        return None
    layers = len({key.split(".")[2] for key in weights if key.startswith("mid_block.transformer_blocks.")})
    shape, window = ([len(first) for first in firsts], layers, table.shape[-1]), (len(table) + 1) // 2
    for name, size in DECODER_SIZES.items():
        if shape == (size.levels, size.layers, size.head_count):
            return name if window == DEFAULT_WINDOW else {"size": name, "window": window}
    return None


class TransformerBlock(nn.Module):
    """Local attention and gated feed-forward; z modulates the first norm."""

    def __init__(self, channels: int, ctx_channels: int, heads: int, window: int):
        super().__init__()
        self.norm1 = AdaLayerNorm(channels, ctx_channels)
        self.attn1 = WindowAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.ff = FeedForward(channels)
        self.relative_position_bias = RelativePositionBias(window, heads)

    def sharded(self) -> list[nn.Module]:
        """See `ssdd.engine.sharding`; norm1 and the position bias are read by `MiddleBlock.condition`."""
        return [self.attn1, self.norm2, self.ff]

    def forward(self, x: Tensor, modulation: Tensor, bias: Tensor, geometry: WindowGeometry) -> Tensor:
        x = x + self.attn1(self.norm1(x, modulation), bias, geometry)
        return x + self.ff(self.norm2(x))


class MiddleBlock(nn.Module):
    """The transformer at 1/8 of the resolution, with a residual connection around everything."""

    recompute = False  # activations of the blocks in the backward pass; see ssdd.engine.recompute

    def __init__(self, channels: int, ctx_channels: int, heads: int, layers: int, groups: int, window: int):
        super().__init__()
        self.window = window
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, ctx_channels, heads, window) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels)
        self.norm = GroupNorm(groups, channels, eps=1e-6)

    def condition(self, ctx: Tensor, height: int, width: int) -> MiddleCondition:
        """What every pass over a token grid of height x width shares for one z."""
        geometry = WindowGeometry.of(height, width, self.window, ctx.device)
        return MiddleCondition(
            geometry,
            [block.norm1.condition(ctx, height, width) for block in self.transformer_blocks],
            [block.relative_position_bias(geometry) for block in self.transformer_blocks],
        )

    def forward(self, x: Tensor, condition: MiddleCondition, keep: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The map, and the tokens [B, H, W, D] after block number `keep`."""
        tokens, kept = self.proj_in(self.norm(x).permute(0, 2, 3, 1)), None  # [B, H, W, D]
        for i, (block, modulation, bias) in enumerate(
            zip(self.transformer_blocks, condition.modulations, condition.biases, strict=True)
        ):
            tokens = run_block(block, tokens, modulation, bias, condition.geometry, recompute=self.recompute)
            kept = tokens if i == keep else kept
        return x + self.proj_out(tokens).permute(0, 3, 1, 2), kept


@dataclass
class MiddleCondition:
    """z-dependent part of the transformer: one modulation and one attention bias per block."""

    geometry: WindowGeometry
    modulations: list[Tensor]
    biases: list[Tensor]


@dataclass
class Condition:
    """Everything in the decoder that depends on z and not on x_t or t: made once per decode, used at every step."""

    z_input: Tensor
    """The z half of the input convolution, [B, C, H, W]."""
    modulations: list[Tensor]
    """One [B, 2 Cin, h, w] for every residual block, in the order of their use."""
    middle: MiddleCondition


class DownBlock(nn.Module):
    """Residual blocks at one resolution, then a downsampling but on the last level."""

    def __init__(self, resnets: list[ResnetBlock], downsample: bool, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(channels)])


class UpBlock(nn.Module):
    """Residual blocks fed with skip connections, then an upsampling but on the last level."""

    def __init__(self, resnets: list[ResnetBlock], upsample: bool, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(channels)])


class UViTDecoder(nn.Module):
    """Velocity network of the tokenizer.

    `size` is a name of `DECODER_SIZES` or a `DecoderSize`; `z_dim` the latent channels.
    Without gradients, activations are overwritten by later ones: hooks that keep them must clone them.
    """

    recompute = False  # activations of the blocks in the backward pass; see ssdd.engine.recompute
    pixel_multiple = DECODER_STRIDE
    halo = None  # group norms see the whole image

    def __init__(self, size: str | DecoderSize, z_dim: int = 4):
        super().__init__()
        size = DECODER_SIZES[size] if isinstance(size, str) else size
        levels, groups = size.levels, size.groups
        ctx, temb, middle = levels[0], 4 * levels[0], levels[-1]
        self.z_dim, self.token_blocks, self.token_width = z_dim, size.layers, middle

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, ctx, temb, groups)

        self.conv_in = nn.Conv2d(3 + z_dim, levels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(levels[0])
        self.ada_ctx_proj = nn.Sequential(
            nn.Conv2d(z_dim, ctx, 3, padding=1), nn.SiLU(), nn.Conv2d(ctx, ctx, 3, padding=1)
        )
        skips = [levels[0]]
        self.down_blocks = nn.ModuleList()
        for i, channels in enumerate(levels):
            resnets = [resnet(skips[-1], channels), resnet(channels, channels)]
            last = i == len(levels) - 1
            self.down_blocks.append(DownBlock(resnets, not last, channels))
            skips += [channels] * (2 if last else 3)
        self.mid_block = MiddleBlock(middle, ctx, size.head_count, size.layers, groups, size.window)
        self.up_blocks = nn.ModuleList()
        below = middle
        for i, channels in enumerate(reversed(levels)):
            resnets = []
            for _ in range(3):
                resnets.append(resnet(below + skips.pop(), channels))
                below = channels
            self.up_blocks.append(UpBlock(resnets, i < len(levels) - 1, channels))
        self.conv_norm_out = GroupNorm(groups, levels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(levels[0], 3, 3, padding=1)
        self._compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None
        self.initialise(size.init_std)

    def initialise(self, std: float | None) -> None:
        """As SSDD's code: output layers of residual branches zero, other convolutions N(0, std^2), linears Xavier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5 if std is None else std)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, FeedForward):
                nn.init.zeros_(module.proj_out.weight)

    def compile(self, **options: object) -> None:
        """torch.compile what runs at every step, in place."""
        self._compiled = torch.compile(self._velocity_and_tokens, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": None}  # a copy's would run these weights

    def condition(self, z: Tensor, height: int, width: int, whole: Tensor | None = None) -> Condition:
        """The part of a decode to height x width pixels that depends on z [B, z_dim, h, w] alone; `whole` is not used.

        ValueError if the sides are not multiples of 8 or z has the wrong number of channels. RuntimeError under
        sequential offloading, which fills in weights layer by layer, while this reads halves of `conv_in` by itself.
        """
        if height % DECODER_STRIDE or width % DECODER_STRIDE:
            raise ValueError(f"the decoder works on sides that are multiples of {DECODER_STRIDE}, got {height}x{width}")
        if z.shape[1] != self.z_dim:
            raise ValueError(f"the decoder takes latents of {self.z_dim} channels, got {z.shape[1]}")
        if self.conv_in.weight.device.type == "meta" and z.device.type != "meta":
            raise RuntimeError(
                "the decoder's weights are not loaded: offloading must move the decoder as a whole, not layer by layer"
            )
        z = z.to(self.conv_in.weight.dtype)
        ctx = self.ada_ctx_proj(z)
        z_pixels = F.interpolate(z, size=(height, width), mode="nearest")
        z_input = F.conv2d(z_pixels, self.conv_in.weight[:, 3:], self.conv_in.bias, padding=1)

        def at_level(block: DownBlock | UpBlock, factor: int) -> list[Tensor]:
            return [resnet.norm1.condition(ctx, height // factor, width // factor) for resnet in block.resnets]

        modulations = []
        for block, factor in zip(self.down_blocks, (1, 2, 4, 8), strict=True):
            modulations += at_level(block, factor)
        for block, factor in zip(self.up_blocks, (8, 4, 2, 1), strict=True):
            modulations += at_level(block, factor)
        middle = self.mid_block.condition(ctx, height // DECODER_STRIDE, width // DECODER_STRIDE)
        return Condition(z_input, modulations, middle)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v [B, 3, H, W] float32 at image x_t and time t (scalar or [B])."""
        return self.velocity_and_tokens(x_t, t, condition)[0]

    def velocity_and_tokens(
        self, x_t: Tensor, t: Tensor, condition: Condition, keep: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """v, and the tokens [B, H/8, W/8, D] after transformer block number `keep`.

        One image stands for all where there are several z, and one z where there are several images. ValueError where
        their numbers, or that of the times, do not match.
        """
        x_t = x_t.expand(common_batch(len(x_t), len(condition.z_input), t.numel()), -1, -1, -1)
        return (self._compiled or self._velocity_and_tokens)(x_t, t, condition, keep)

    def _velocity_and_tokens(
        self, x_t: Tensor, t: Tensor, condition: Condition, keep: int | None
    ) -> tuple[Tensor, Tensor | None]:
        x_t = x_t.to(self.conv_in.weight.dtype)
        temb = F.silu(self.time_embedding(t))
        modulations = iter(condition.modulations)
        h = add(F.conv2d(x_t, self.conv_in.weight[:, :3], padding=1), condition.z_input)
        skips = [h]
        for block in self.down_blocks:
            for resnet in block.resnets:
                h = run_block(resnet, h, temb, next(modulations), recompute=self.recompute)
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = block.downsamplers[0](h)
                skips.append(h)
        h, tokens = self.mid_block(h, condition.middle, keep)
        for block in self.up_blocks:
            for resnet in block.resnets:
                h = run_block(resnet, h, temb, next(modulations), skips.pop(), recompute=self.recompute)
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0](h)
        return self.conv_out(silu(self.conv_norm_out(h))).float(), tokens

    def forward(self, x_t: Tensor, t: Tensor | float, z: Tensor) -> Tensor:
        """v = x - eps, float32 [B, 3, H, W], at x_t of that shape, t in [0, 1] (scalar or [B]), z [B, z_dim, h, w]."""
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device)
        return self.velocity(x_t, t, self.condition(z, *x_t.shape[-2:]))
