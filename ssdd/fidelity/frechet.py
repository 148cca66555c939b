"""Frechet distance of two Gaussians in feature space (FID, Heusel et al. 2017), in float64."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ssdd.fidelity.moments import Statistics


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + Tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), never negative (Heusel et al. 2017).

    With roots cov = R R^T, the trace of the product's root is the sum of the singular values of R_a^T R_b. scipy's
    sqrtm of the product has given wrong figures on several platforms (pytorch-fid issues 100 and 103), and roots of the
    product's eigenvalues turn rounding of 1e-16 into 1e-8 wherever covariances are singular.
    Warns when a covariance is singular, as with no more images than features: then most of the value is bias.
    """
    dim = len(a.mean)
    roots = [_covariance_root(statistics) for statistics in (a, b)]
    for statistics, root in zip((a, b), roots, strict=True):
        if statistics.count is not None and statistics.count <= dim:
            warnings.warn(
                f"Frechet distance of {statistics.count} images in {dim} dimensions is mostly bias; look at KID",
                stacklevel=2,
            )
        elif root.shape[1] < dim:
            warnings.warn(
                f"Frechet distance of a singular covariance: rank {root.shape[1]} of {dim} dimensions", stacklevel=2
            )
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum() if min(r.shape[1] for r in roots) else 0
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(0.0, distance.item())


def _covariance_root(statistics: Statistics) -> Tensor:
    """R with cov = R R^T: the centred features of few images, else scaled eigenvectors [dim, rank]; float64."""
    dim, features = len(statistics.mean), statistics.features
    if features is not None and len(features) == statistics.count <= dim:
        return (features.double() - statistics.mean).T / (statistics.count - 1) ** 0.5
    values, vectors = torch.linalg.eigh(statistics.cov)
    kept = values > values[-1] * dim * torch.finfo(values.dtype).eps  # less is rounding, as in matrix_rank
    return vectors[:, kept] * values[kept].sqrt()
