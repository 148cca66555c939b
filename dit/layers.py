"""Layers of the diffusion transformers: DiT's (Peebles & Xie 2022) and LightningDiT's (Yao et al. 2025) options.

Parameter names and shapes are those of facebookresearch/DiT, SiT and LightningDiT. DiT's layers are proved against
reference outputs. LightningDiT's follow its published equations and state dict; where names and shapes leave a choice
(rows before columns in the rotary embedding, the order of the four parts without shifts, which norm qk-norm is), the
docstrings say what was taken, and no reference output of LightningDiT has confirmed it yet.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit.options import BlockVariants


def sincos_position_table(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine position table, float32 [1, height * width, dim], tokens row by row.

    The first half of the channels encodes the column, the second the row; each half is [sin, cos]. `dim` divides by 4.
    """
    frequencies = 10000.0 ** -(np.arange(dim // 4, dtype=np.float64) / (dim // 4))

    def axis(positions: np.ndarray) -> np.ndarray:  # [T] -> [T, dim / 2]
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    table = np.concatenate([axis(column.astype(np.float64)), axis(row.astype(np.float64))], axis=1)
    return torch.from_numpy(table.astype(np.float32)).unsqueeze(0)


def rotary_tables(height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 2-D rotary embedding, float32 [height * width, head_dim] each, tokens row by row.

    The first half of a head's channels turns with the row, the second with the column (counted in tokens from 0), with
    frequencies 10000^(-2i / (head_dim / 2)), each repeated for the two neighbouring channels that it rotates.
    `head_dim` divides by 4. LightningDiT's `feat_rope` (EVA-02's rotary embedding with pt_seq_len = ft_seq_len = side).
    """
    frequencies = 10000.0 ** -(np.arange(0, head_dim // 2, 2, dtype=np.float64) / (head_dim // 2))
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    halves = [axis.reshape(-1, 1) * frequencies for axis in (row, column)]
    angles = np.concatenate(halves, axis=1).repeat(2, axis=1)
    return torch.from_numpy(np.cos(angles).astype(np.float32)), torch.from_numpy(np.sin(angles).astype(np.float32))


def resize_positions(table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A position table [1, T, h] of one token grid (rows, columns) for another one.

    The fixed sine-cosine table is computed for the new grid, which continues its coordinates; any other (a learned
    one) is resampled bicubically.
    """
    if grid == new_grid:
        return table
    dim = table.shape[-1]
    # Half precision files round the table, by up to 4e-3 in bfloat16.
    if torch.allclose(table.float(), sincos_position_table(*grid, dim), rtol=0, atol=4e-3):
        return sincos_position_table(*new_grid, dim).to(table.dtype)
    rows, columns = grid
    plane = rearrange(table.float(), "1 (i j) h -> 1 h i j", i=rows, j=columns)
    plane = F.interpolate(plane, size=new_grid, mode="bicubic", align_corners=False)
    return rearrange(plane, "1 h i j -> 1 (i j) h").to(table.dtype).contiguous()


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift for tokens x [B, T, h] and one shift (None: 0) and scale [B, h] a sample."""
    if shift is None:
        return x * (1 + scale).unsqueeze(1)
    return torch.addcmul(shift.unsqueeze(1), x, (1 + scale).unsqueeze(1))


def gelu(x: Tensor) -> Tensor:
    """x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), the approximate GELU of Hendrycks & Gimpel 2016."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # (1 + tanh u) / 2 = sigmoid(2 u): in code generated for CPUs, tanh takes longer than all the rest.
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


class PatchEmbed(nn.Module):
    """Latent [B, C, H, W] to tokens [B, (H/p) (W/p), h], row by row."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # As a matrix product, whose tokens lie one after the other: the layout that all blocks inherit.
        p = self.patch_size
        patches = rearrange(x, "b c (i p) (j q) -> b (i j) (c p q)", p=p, q=p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Times [B] to [B, h]: 256 sinusoids (cosines first, periods up to 10000) and a two-layer MLP."""

    def __init__(self, width: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_dim // 2
        # float32 whatever the module's dtype: bfloat16 cannot distinguish 871 from 872.
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000.0) / half))
        angles = t.float().unsqueeze(1) * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels [B] to [B, h]; the last row, if there is one more than classes, is the null class."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class RotaryEmbedding(nn.Module):
    """2-D rotary position embedding of queries and keys [B, heads, T, head_dim]; see `rotary_tables`."""

    def __init__(self, grid: tuple[int, int], head_dim: int) -> None:
        super().__init__()
        cosines, sines = rotary_tables(*grid, head_dim)
        self.register_buffer("freqs_cos", cosines)
        self.register_buffer("freqs_sin", sines)

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        quarter_turn = torch.stack([-odd, even], dim=-1).flatten(-2)
        return (x * self.freqs_cos + quarter_turn * self.freqs_sin).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight over the last dimension, computed in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-6).to(x.dtype)


def token_norm(width: int, rms_norm: bool) -> nn.Module:
    """LayerNorm without affine parameters as in DiT, or RMSNorm with a learned scale as in LightningDiT."""
    return RMSNorm(width) if rms_norm else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens.

    `qk_norm` normalises queries and keys over the channels of a head, before the rotation: with an RMSNorm (weight,
    eps 1e-6) in a model of RMSNorms, as in LightningDiT, else with timm's LayerNorm (weight and bias, eps 1e-5), as in
    SiT and REPA.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, rms_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        if qk_norm:
            dim = width // heads
            self.q_norm, self.k_norm = (RMSNorm(dim) if rms_norm else nn.LayerNorm(dim) for _ in range(2))
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: RotaryEmbedding | None = None) -> Tensor:
        # Split before the heads: the backward pass then joins the three gradients by one copy.
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        # Under autocast LayerNorm returns float32; attention needs one dtype.
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)  # [B, heads, T, h / heads]
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(a) b) with (a, b) = w12(x) (Shazeer 2020), parameters named as in LightningDiT (DINOv2's layer)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT section 3.2).

    `swiglu` replaces the MLP of width 4h by a gated one of as many parameters, int(2/3 4h) wide. `wo_shift` omits the
    shifts of adaLN: its linear layer gives scale, gate (attention), scale, gate (MLP). variants: of `BlockVariants`.
    """

    def __init__(self, width: int, heads: int, **variants: bool) -> None:
        super().__init__()
        on = BlockVariants(**variants)
        self.wo_shift = on.wo_shift
        self.norm1 = token_norm(width, on.rms_norm)
        self.attn = Attention(width, heads, on.qk_norm, on.rms_norm)
        self.norm2 = token_norm(width, on.rms_norm)
        self.mlp = SwiGLU(width, int(2 / 3 * (4 * width))) if on.swiglu else Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (4 if on.wo_shift else 6) * width))

    def forward(self, x: Tensor, c: Tensor, rotary: RotaryEmbedding | None = None) -> Tensor:
        modulation = self.adaLN_modulation(c)
        if self.wo_shift:
            shift_attn = shift_mlp = None
            scale_attn, gate_attn, scale_mlp, gate_mlp = modulation.chunk(4, dim=1)
        else:
            shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        attended = self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rotary)
        x = torch.addcmul(x, gate_attn.unsqueeze(1), attended)
        return torch.addcmul(x, gate_mlp.unsqueeze(1), self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Tokens [B, T, h] to output patches [B, T, p p O], channels fastest; its shift stays with `wo_shift`."""

    def __init__(self, width: int, patch_size: int, out_channels: int, rms_norm: bool = False) -> None:
        super().__init__()
        self.norm_final = token_norm(width, rms_norm)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
