"""Baselines for tokenizers and generators: PCA of the pixels, Gaussians in that space, a slight blur."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssdd.engine.random import seed_of
from ssdd.images.pixels import PEAK

ROWS = 2048  # images that are float64 at a time


class PixelPCA:
    """Principal components of training images (uint8 [n, 3, H, W]): as many numbers per image as a latent has."""

    def __init__(self, images: Tensor, numbers: int):
        from sklearn.decomposition import PCA

        self.shape = images.shape[1:]
        dim = images[0].numel()
        solver = "covariance_eigh" if len(images) >= dim else "full"  # full holds several copies of all images
        pca = PCA(min(numbers, len(images), dim), svd_solver=solver)
        self.pca = pca.fit(images.flatten(1).double().numpy())

    def encode(self, images: Tensor) -> np.ndarray:
        """uint8 [n, 3, H, W] -> float64 [n, numbers]."""
        parts = (self.pca.transform(part.flatten(1).double().numpy()) for part in images.split(ROWS))
        return np.concatenate(list(parts))

    def decode(self, numbers: np.ndarray) -> Tensor:
        """float64 [n, numbers] -> uint8 [n, 3, H, W], rounded."""
        pixels = torch.from_numpy(self.pca.inverse_transform(numbers)).unflatten(1, self.shape)
        return pixels.round().clamp(0, PEAK).to(torch.uint8)


def classwise_gaussian_samples(pca: PixelPCA, images: Tensor, labels: Tensor, wanted: Tensor, seed: int) -> Tensor:
    """Samples of the classes `wanted` (int64 [m]): one Gaussian per class in PCA space, fitted to training images."""
    codes = pca.encode(images)
    samples = np.empty((len(wanted), codes.shape[1]))
    for label in wanted.unique().tolist():
        own = codes[(labels == label).numpy()]
        draw = np.random.Generator(np.random.PCG64(seed_of(seed, "gaussian", label)))
        where = (wanted == label).numpy()
        one = len(own) == 1  # a class of one image has no spread
        covariance = np.zeros((codes.shape[1],) * 2) if one else np.atleast_2d(np.cov(own, rowvar=False))
        samples[where] = draw.multivariate_normal(own.mean(axis=0), covariance, size=int(where.sum()), method="eigh")
    return pca.decode(samples)


def slight_blur(images: Tensor) -> Tensor:
    """uint8 [n, 3, H, W] filtered with the binomial kernel [1 2 1]/4 in both directions."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=images.device) / 4
    kernel = torch.outer(kernel, kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return blurred.round().to(torch.uint8)
