"""Nearest neighbours in feature space: precision, recall and copies, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 2048  # rows of a distance matrix that are in memory at a time


def precision(real: Tensor, generated: Tensor, k: int = 3) -> float:
    """Share of generated images inside a ball around some real image that reaches to its k-th nearest other real image.

    Features [n, dim] and [m, dim] (Kynkaanniemi et al. 2019). ValueError for k real images or fewer.
    """
    return _covered(generated, real, k)


def recall(real: Tensor, generated: Tensor, k: int = 3) -> float:
    """`precision` with the sets exchanged."""
    return _covered(real, generated, k)


def copy_rate(generated: Tensor, train: Tensor, heldout: Tensor) -> tuple[float, float]:
    """Shares of generated and of held-out real images that look like copies of a training image; features [*, dim].

    An image counts as a copy when it lies closer to its nearest training image than that one lies to its own nearest
    other training image (authenticity; Alaa et al. 2022). Unseen real images do so at some rate by chance, so only the
    difference between the two shares is meaningful.
    """
    to_next = torch.cat([_nearest(block, 1)[0] for block in _squared_distances(train, train, exclude_same=True)])

    def rate(images: Tensor) -> float:
        copies = [
            (distance[:, 0] < to_next[place[:, 0], 0])
            for distance, place in (_nearest(block, 1) for block in _squared_distances(images, train))
        ]
        return torch.cat(copies).double().mean().item()

    return rate(generated), rate(heldout)


def _squared_distances(x: Tensor, y: Tensor, exclude_same: bool = False) -> Iterator[Tensor]:
    """Squared distances of blocks of rows of x to all rows of y: [<= ROWS, m]; exclude_same: none to a row itself."""
    y = y.to(x.device, torch.float64)
    lengths = y.square().sum(dim=1)
    for first in range(0, len(x), ROWS):
        block = x[first : first + ROWS].double()
        distances = torch.addmm(lengths, block, y.T, alpha=-2).add_(block.square().sum(dim=1, keepdim=True))
        if exclude_same:
            distances.diagonal(first).fill_(torch.inf)
        yield distances.clamp_(min=0)


def _nearest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, ascending: values [n, k], columns [n, k]."""
    return torch.topk(distances, k, dim=1, largest=False)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of points inside the ball of any centre that reaches to its k-th nearest other centre."""
    if len(centres) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} images, got {len(centres)}")
    others = _squared_distances(centres, centres, exclude_same=True)
    radii = torch.cat([_nearest(block, k)[0][:, -1] for block in others])
    inside = [(block <= radii).any(dim=1) for block in _squared_distances(points, centres)]
    return torch.cat(inside).double().mean().item()
