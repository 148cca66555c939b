"""Large images in tiles: overlapping ones whose results are blended, or ones that see a halo and are exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A rectangle of the image, and the weight of its result there."""

    rows: slice
    columns: slice
    weight: Tensor
    """float32 [height, width]; the weights of all tiles add up to 1 at every pixel."""


def tile_image(height: int, width: int, side: int, overlap: int, multiple: int) -> list[Tile]:
    """Tiles of at most `side` pixels that overlap by at least `overlap`; all edges are multiples of `multiple`.

    Within an overlap the outer quarters of both tiles have no weight and the middle half is a linear blend: where a
    result depends on the image within overlap / 4 pixels only, tiles leave no trace at all. ValueError if the tiles
    would not advance.
    """
    side, overlap = side // multiple * multiple, -(-overlap // multiple) * multiple
    if overlap < 0 or side <= overlap:
        raise ValueError(f"tiles of {side} pixels that overlap by {overlap} do not advance; make them larger")
    down, across = (_spans(length, side, overlap, multiple) for length in (height, width))
    weights_down, weights_across = (
        _weights(spans, length, overlap) for spans, length in ((down, height), (across, width))
    )
    return [
        Tile(rows, columns, torch.outer(weight_y[rows], weight_x[columns]))
        for rows, weight_y in zip(down, weights_down, strict=True)
        for columns, weight_x in zip(across, weights_across, strict=True)
    ]


def tile_with_halo(height: int, width: int, side: int, halo: int, multiple: int) -> list[Tile]:
    """Tiles whose interiors, squares of about `side` pixels, are the whole image once; each also sees `halo` pixels on
    every side of it, without weight. All edges are multiples of `multiple`.

    Where a result depends on the image within `halo` pixels only, tiles give exactly the whole image's.
    """
    halo = -(-halo // multiple) * multiple

    def spans(length: int) -> list[tuple[slice, slice]]:
        """(what a tile sees, its interior)."""
        cells, count = length // multiple, -(-length // max(side, multiple))
        edges = [i * cells // count * multiple for i in range(count + 1)]
        interiors = [slice(start, stop) for start, stop in pairwise(edges)]
        return [(slice(max(0, s.start - halo), min(length, s.stop + halo)), s) for s in interiors]

    def weight(seen: slice, interior: slice) -> Tensor:
        ones = torch.zeros(seen.stop - seen.start)
        ones[interior.start - seen.start : interior.stop - seen.start] = 1
        return ones

    return [
        Tile(rows, columns, torch.outer(weight(rows, inner_rows), weight(columns, inner_columns)))
        for rows, inner_rows in spans(height)
        for columns, inner_columns in spans(width)
    ]


def blend(tiles: Sequence[Tile], result: Callable[[Tile], Tensor], like: Tensor, progress: bool = False) -> Tensor:
    """The weighted sum of the tiles' results [..., tile height, tile width], as an image like `like`."""
    image = torch.zeros_like(like)
    if progress:
        from tqdm import tqdm

        tiles = tqdm(tiles, desc="tiles", unit="tile")
    for tile in tiles:
        image[..., tile.rows, tile.columns] += result(tile) * tile.weight.to(image.device)
    return image


def _spans(length: int, side: int, overlap: int, multiple: int) -> list[slice]:
    if length <= side:
        return [slice(0, length)]
    count = -(-(length - overlap) // (side - overlap))
    starts = [i * (length - side) // (count - 1) // multiple * multiple for i in range(count - 1)]
    return [slice(start, start + side) for start in [*starts, length - side]]


def _weights(spans: Sequence[slice], length: int, overlap: int) -> list[Tensor]:
    """For each span float32 [length], zero outside it."""
    position = torch.arange(length, dtype=torch.float64) + 0.5
    margin, ramp = overlap / 4, max(overlap / 2, 1e-9)
    weights = []
    for span in spans:
        rise = torch.ones_like(position) if span.start == 0 else (position - span.start - margin) / ramp
        fall = torch.ones_like(position) if span.stop == length else (span.stop - position - margin) / ramp
        weights.append(torch.minimum(rise, fall).clamp(0, 1) * ((position > span.start) & (position < span.stop)))
    total = torch.stack(weights).sum(dim=0)
    return [(weight / total).float() for weight in weights]
