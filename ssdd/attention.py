"""Sliding-window self-attention with a learned relative position bias, linear in the number of tokens.

Every query attends to the keys at most `window - 1` rows and columns away; the logit of query i and key j gets
table[y_i - y_j + window - 1, x_i - x_j + window - 1, head] (Swin's relative bias, centred on every query). Queries are
grouped into window x window tiles; a tile and its halo of keys is one fused attention call, and all tiles share one
bias of [heads, window^2, (3 window - 2)^2], so no N x N mask exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class WindowGeometry:
    """What all attention layers of one forward pass share for a token grid: tile layout, bias index, masks."""

    height: int
    width: int
    window: int
    tiles: tuple[int, int]
    """Number of query tiles down and across."""
    tile: tuple[int, int]
    """Queries a tile, down and across."""
    halo: int
    """Keys beyond the tile on each side."""
    bias_index: Tensor
    """int64 [tile queries, tile keys] into the flattened bias table; 0 where `visible` is false."""
    visible: Tensor
    """bool [tiles or 1, 1, tile queries, tile keys]: the key lies inside the window and inside the grid."""

    @classmethod
    def of(cls, height: int, width: int, window: int, device: torch.device) -> WindowGeometry:
        """Geometry for a grid of height x width tokens."""
        single = height <= window and width <= window
        tile_h, tile_w = (height, width) if single else (window, window)
        halo = 0 if single else window - 1
        tiles = (-(-height // tile_h), -(-width // tile_w))

        def offsets(tile: int) -> Tensor:  # query minus key, [tile, tile + 2 halo]
            query = torch.arange(tile, device=device)[:, None]
            return query - (torch.arange(tile + 2 * halo, device=device)[None] - halo)

        dy, dx = offsets(tile_h)[:, None, :, None], offsets(tile_w)[None, :, None, :]
        reach = window - 1
        inside = ((dy.abs() <= reach) & (dx.abs() <= reach)).reshape(tile_h * tile_w, -1)
        index = ((dy + reach) * (2 * window - 1) + dx + reach).reshape(tile_h * tile_w, -1)

        def key_inside(tile: int, count: int, length: int) -> Tensor:  # [count, tile + 2 halo]
            start = torch.arange(count, device=device)[:, None] * tile - halo
            position = start + torch.arange(tile + 2 * halo, device=device)[None]
            return (position >= 0) & (position < length)

        rows, columns = key_inside(tile_h, tiles[0], height), key_inside(tile_w, tiles[1], width)
        keys = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(tiles[0] * tiles[1], 1, 1, -1)
        visible = inside & (keys[:1] if single else keys)
        return cls(height, width, window, tiles, (tile_h, tile_w), halo, index * inside, visible)

    def query_tiles(self, x: Tensor) -> Tensor:
        """[B, H, W, heads, d] -> [B * tiles, heads, tile queries, d]."""
        (ty, tx), (th, tw) = self.tiles, self.tile
        x = F.pad(x, (0, 0, 0, 0, 0, tx * tw - self.width, 0, ty * th - self.height))
        x = x.unflatten(2, (tx, tw)).unflatten(1, (ty, th))  # [B, ty, th, tx, tw, heads, d]
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)

    def key_tiles(self, x: Tensor) -> Tensor:
        """[B, H, W, heads, d] -> [B * tiles, heads, tile keys, d]; keys outside the grid are zero."""
        (ty, tx), (th, tw), halo = self.tiles, self.tile, self.halo
        x = F.pad(x, (0, 0, 0, 0, halo, tx * tw - self.width + halo, halo, ty * th - self.height + halo))
        x = x.unfold(1, th + 2 * halo, th).unfold(2, tw + 2 * halo, tw)  # [B, ty, tx, heads, d, kh, kw]
        return x.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5).flatten(0, 2)

    def merge_tiles(self, x: Tensor) -> Tensor:
        """[B * tiles, heads, tile queries, d] -> [B, H, W, heads * d]."""
        (ty, tx), (th, tw) = self.tiles, self.tile
        x = x.unflatten(2, (th, tw)).unflatten(0, (-1, ty, tx))  # [B, ty, tx, heads, th, tw, d]
        x = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return x[:, : self.height, : self.width]


class RelativePositionBias(nn.Module):
    """Learned table [2 window - 1, 2 window - 1, heads], zero at the start."""

    def __init__(self, window: int, heads: int):
        super().__init__()
        self.relative_bias_table = nn.Parameter(torch.zeros(2 * window - 1, 2 * window - 1, heads))

    def forward(self, geometry: WindowGeometry) -> Tensor:
        """Additive float mask [tiles or 1, heads, tile queries, tile keys], -inf where the key is not visible."""
        bias = self.relative_bias_table.flatten(0, 1)[geometry.bias_index].permute(2, 0, 1)[None]
        return bias.masked_fill(~geometry.visible, float("-inf"))


class WindowAttention(nn.Module):
    """Multi-head attention over a token grid [B, H, W, D]; q, k, v without bias, output projection with bias."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, bias: Tensor, geometry: WindowGeometry) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.to_q, self.to_k, self.to_v))
        q, k, v = geometry.query_tiles(q), geometry.key_tiles(k), geometry.key_tiles(v)
        mask = bias.to(q.dtype).repeat(q.shape[0] // bias.shape[0], 1, 1, 1) if bias.shape[0] > 1 else bias.to(q.dtype)
        return self.out_proj(geometry.merge_tiles(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
