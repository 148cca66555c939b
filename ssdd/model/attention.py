"""Sliding-window self-attention with a learned relative position bias, linear in the number of tokens.

Every query attends to the keys at most `window - 1` rows and columns away; the logit of query i and key j gets
table[y_i - y_j + window - 1, x_i - x_j + window - 1, head] (Swin's relative bias, centred on every query). Queries are
grouped into window x window tiles, each of which sees the keys of its tile and halo. Rows of tiles are the batch and
tiles of a row take the place of heads in fused attention calls, one for every run of rows with the same keys at the
grid's edge: their bias is shared by the rows of the run and by the images, and no N x N mask exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CPU_KEY_BYTES = 16 << 20
"""On a CPU a call gathers keys of this size at most: larger buffers leave the cache, and come as fresh pages."""


@dataclass(frozen=True)
class Band:
    """A run of rows of tiles whose keys lie at the same places relative to the grid's edge."""

    first: int
    count: int
    mask: int
    """Which of `WindowGeometry.hidden` and of the biases."""


@dataclass(frozen=True)
class WindowGeometry:
    """What all attention layers of one forward pass share for a token grid: tile layout, bias index, masks."""

    height: int
    width: int
    window: int
    tiles: tuple[int, int]
    """Number of query tiles down and across."""
    tile: tuple[int, int]
    """Queries per tile, down and across."""
    halo: int
    """Keys beyond the tile on each side."""
    bands: tuple[Band, ...]
    bias_index: Tensor
    """int64 [tile queries, tile keys] into the flattened bias table; 0 beyond the window."""
    hidden: Tensor
    """[masks, tiles across, 1, tile queries, tile keys]: 0 for keys inside the window and the grid, -inf for others."""

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

        # The keys of a tile that lie inside the grid are a range; rows of tiles with equal ranges form a band.
        rows = [_inside(i * tile_h - halo, tile_h + 2 * halo, height) for i in range(tiles[0])]
        columns = [_inside(i * tile_w - halo, tile_w + 2 * halo, width) for i in range(tiles[1])]
        ranges = list(dict.fromkeys(rows))
        runs = [list(run) for _, run in groupby(range(tiles[0]), key=rows.__getitem__)]
        bands = tuple(Band(run[0], len(run), ranges.index(rows[run[0]])) for run in runs)

        def in_ranges(ranges: list[tuple[int, int]], length: int) -> Tensor:  # [len(ranges), length]
            position = torch.arange(length, device=device)
            return torch.stack([(position >= start) & (position < stop) for start, stop in ranges])

        key_rows = in_ranges(ranges, tile_h + 2 * halo)[:, None, :, None]
        key_columns = in_ranges(columns, tile_w + 2 * halo)[None, :, None, :]
        keys = (key_rows & key_columns).flatten(2)[:, :, None, None]  # [masks, tiles across, 1, 1, tile keys]
        hidden = torch.zeros((), device=device).where(inside & keys, float("-inf"))
        return cls(height, width, window, tiles, (tile_h, tile_w), halo, bands, index * inside, hidden)

    def query_tiles(self, x: Tensor) -> Tensor:
        """[B, n tile height, W, heads, d] -> [B n, tiles across * heads, tile queries, d]; W is whole tiles."""
        x = x.unflatten(2, (self.tiles[1], -1)).unflatten(1, (-1, self.tile[0]))  # [B, n, th, tx, tw, heads, d]
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(2, 3).flatten(0, 1)

    def key_tiles(self, x: Tensor) -> Tensor:
        """[B, n tile height + 2 halo, W + 2 halo, heads, d] -> [B n, tiles across * heads, tile keys, d]."""
        return OverlappingTiles.apply(x, self.tile, self.halo).flatten(4, 5).flatten(2, 3).flatten(0, 1)

    def merge_tiles(self, x: Tensor, batch: int) -> Tensor:
        """[B n, tiles across * heads, tile queries, d] -> [B, n tile height, W, heads * d]."""
        x = x.unflatten(2, self.tile).unflatten(1, (self.tiles[1], -1)).unflatten(0, (batch, -1))
        x = x.permute(0, 1, 4, 2, 5, 3, 6)  # [B, n, th, tx, tw, heads, d]
        return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)

    def calls(self, band: Band, row_bytes: int, device: torch.device) -> Iterator[tuple[int, int]]:
        """First and number of a band's rows of tiles for each attention call.

        On a CPU their keys, `row_bytes` for a row of tiles, stay below CPU_KEY_BYTES.
        """
        most = band.count if device.type != "cpu" else max(1, CPU_KEY_BYTES // row_bytes)
        for first in range(0, band.count, most):
            yield band.first + first, min(most, band.count - first)


class OverlappingTiles(torch.autograd.Function):
    """Tiles with their halo, [B, H, W, heads, d] -> [B, down, across, heads, tile height + 2 halo, and width, d].

    Gradients are summed a tile's size at a time, where tiles do not overlap: far faster than what `unfold` would do.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, tile: tuple[int, int], halo: int) -> Tensor:
        (th, tw), span = tile, 2 * halo
        return x.unfold(1, th + span, th).unfold(2, tw + span, tw).movedim(4, 6).contiguous()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, tuple[int, int], int], output: Tensor) -> None:
        ctx.shape, ctx.tile = inputs[0].shape, inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (batch, height, width, heads, d), (th, tw) = ctx.shape, ctx.tile
        down, across, rows, columns = grad.shape[1], grad.shape[2], grad.shape[4], grad.shape[5]
        beyond_h, beyond_w = -rows % th, -columns % tw  # so that each sum covers whole tiles: slices and views only
        total = grad.new_zeros(batch, height + beyond_h, width + beyond_w, heads, d)
        grad = grad.permute(0, 1, 4, 2, 5, 3, 6)  # [B, down, rows, across, columns, heads, d]
        for y in range(0, rows, th):
            for x in range(0, columns, tw):
                part = grad[:, :, y : y + th, :, x : x + tw]
                places = total[:, y : y + down * th, x : x + across * tw]
                places = places.unflatten(2, (across, tw)).unflatten(1, (down, th))
                places[:, :, : part.shape[2], :, : part.shape[4]] += part
        return total[:, :height, :width], None, None


def _inside(start: int, length: int, limit: int) -> tuple[int, int]:
    """The part of `length` positions from `start` on that lies in [0, limit), relative to `start`."""
    return max(0, -start), min(length, limit - start)


class RelativePositionBias(nn.Module):
    """Learned table [2 window - 1, 2 window - 1, heads], zero at the start."""

    def __init__(self, window: int, heads: int):
        super().__init__()
        self.relative_bias_table = nn.Parameter(torch.zeros(2 * window - 1, 2 * window - 1, heads))

    def forward(self, geometry: WindowGeometry) -> Tensor:
        """What is added to the logits of a tile, [heads, tile queries, tile keys]."""
        return self.relative_bias_table.flatten(0, 1).T.contiguous()[:, geometry.bias_index]


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
        (th, tw), halo = geometry.tile, geometry.halo
        below, right = geometry.tiles[0] * th - geometry.height, geometry.tiles[1] * tw - geometry.width
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.to_q, self.to_k, self.to_v))
        q = F.pad(q, (0, 0, 0, 0, 0, right, 0, below))
        k, v = (F.pad(y, (0, 0, 0, 0, halo, right + halo, halo, below + halo)) for y in (k, v))
        bias, hidden = bias.to(q.dtype), geometry.hidden.to(q.dtype)
        row_bytes = len(x) * geometry.tiles[1] * geometry.bias_index.shape[1] * x.shape[-1] * x.element_size()
        parts = []
        for band in geometry.bands:
            mask = (hidden[band.mask] + bias).flatten(0, 1)[None]  # here, as the masks of all blocks would be large
            for first, rows in geometry.calls(band, row_bytes, x.device):
                start, stop = first * th, (first + rows) * th
                queries = geometry.query_tiles(q[:, start:stop])
                keys, values = (geometry.key_tiles(y[:, start : stop + 2 * halo]) for y in (k, v))
                tiles = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
                parts.append(geometry.merge_tiles(tiles, len(x)))
        grid = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return self.out_proj(grid[:, : geometry.height, : geometry.width])
