"""The best linear map from a latent cell to the pixels under it, in closed form."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssdd.engine.errors import UserError


def fit_linear_base(pairs: Iterable[tuple[Tensor, Tensor]], ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Ridge regression of image patches on latents: weight [3 f^2, c] and bias [3 f^2], float32 on the CPU.

    pairs: batches of latents [n, c, h, w] and their images [n, 3, h f, w f]; rows of the weight are in the order of
    `torch.nn.functional.pixel_unshuffle`. ridge: in variances of each latent channel; the mean is not shrunk. Sums are
    float64. UserError if there is no pair.
    """
    squares, products, cells = 0.0, 0.0, 0
    for z, x in pairs:
        patches = F.pixel_unshuffle(x.double(), x.shape[-1] // z.shape[-1]).movedim(1, -1).flatten(0, -2)
        inputs = z.double().movedim(1, -1).flatten(0, -2)
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)  # [cells, c + 1]
        squares, products, cells = squares + inputs.T @ inputs, products + inputs.T @ patches, cells + len(inputs)
    if not cells:
        raise UserError("a linear base needs at least one image")
    squares, products = squares.cpu() / cells, products.cpu() / cells
    mean_z, mean_x = squares[-1, :-1], products[-1]
    covariance = squares[:-1, :-1] - torch.outer(mean_z, mean_z)
    penalty = torch.diag(ridge * covariance.diagonal() + 1e-12)  # a channel without variance gets no weight
    weight = torch.linalg.solve(covariance + penalty, products[:-1] - torch.outer(mean_z, mean_x)).T
    return weight.float().contiguous(), (mean_x - weight @ mean_z).float()
