"""How close images are to their originals, on uint8 pixels: one table, which evaluations and reports follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ssdd.images.pixels import PEAK, to_unit

SSIM_WINDOW = 7
SSIM_K1, SSIM_K2 = 0.01, 0.03


def mse(images: Tensor, originals: Tensor) -> Tensor:
    """Mean squared error, float64 [n], of uint8 images [n, C, H, W] in units of [0, 1]."""
    return _difference(images, originals).square().mean(dim=(1, 2, 3))


def mae(images: Tensor, originals: Tensor) -> Tensor:
    """Mean absolute error, float64 [n], of uint8 images [n, C, H, W] in units of [0, 1]."""
    return _difference(images, originals).abs().mean(dim=(1, 2, 3))


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 [n], of uint8 images [n, C, H, W]; infinite for equal images."""
    return -10 * torch.log10(mse(images, originals))


def pooled_psnr(mean_mse: float) -> float:
    """PSNR in dB of a whole set from the mean of its images' MSEs: all pixels as one image.

    Not above the mean of the images' PSNRs (Jensen). It is what torcheval computes and SSDD's authors report.
    """
    return -10 * math.log10(mean_mse) if mean_mse > 0 else math.inf


def fine_power(images: Tensor) -> Tensor:
    """Power of uint8 images [n, C, H, W] above a quarter of a cycle per pixel, float64 [n], in grey levels squared.

    The mean over channels and the discrete frequencies with max(|fx|, |fy|) > 1/4. A reconstruction with less of it
    than its original is blurred, one with more is noisy.
    """
    spectrum = torch.fft.fft2(images.double(), norm="ortho").abs().square()
    fy, fx = (torch.fft.fftfreq(side, device=images.device).abs() for side in images.shape[2:])
    fine = torch.maximum(fy[:, None], fx[None]) > 0.25
    return spectrum[..., fine].mean(dim=(1, 2))


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity, float64 [n], of uint8 images [n, C, H, W], the mean over positions and channels.

    As scikit-image computes it by default: uniform 7 x 7 window inside the image, sample covariance, K1 = 0.01,
    K2 = 0.03 (Wang et al. 2004).
    """
    _check(images, originals)
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of {SSIM_WINDOW} px or more, got {tuple(images.shape[2:])}")
    x, y = images.double(), originals.double()
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    var_x = sample * (_window_mean(x * x) - mean_x**2)
    var_y = sample * (_window_mean(y * y) - mean_y**2)
    cov = sample * (_window_mean(x * y) - mean_x * mean_y)
    c1, c2 = (SSIM_K1 * PEAK) ** 2, (SSIM_K2 * PEAK) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (numerator / denominator).mean(dim=(1, 2, 3))


def _window_mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, SSIM_WINDOW, stride=1)


def _difference(images: Tensor, originals: Tensor) -> Tensor:
    _check(images, originals)
    return to_unit(images.double() - originals.double())


def _check(images: Tensor, originals: Tensor) -> None:
    if images.dtype != torch.uint8 or originals.dtype != torch.uint8 or images.shape != originals.shape:
        raise ValueError(
            f"expected two uint8 tensors of one shape [n, C, H, W], got {images.dtype} {tuple(images.shape)} "
            f"and {originals.dtype} {tuple(originals.shape)}"
        )


@dataclass(frozen=True)
class PixelMetric:
    """A figure of a set of images beside its originals.

    measure: of each image, float64 [n] or [n, k] of uint8 images and originals [n, C, H, W]; pool: the figure from the
    mean over the images, [] or [k].
    label: of its column in tables, "" for none; decimals, better (an arrow): of that column, and for ↑ and ↓ whether
    more of it makes a checkpoint the best.
    """

    measure: Callable[[Tensor, Tensor], Tensor]
    label: str = ""
    decimals: int = 4
    better: str = ""
    pool: Callable[[Tensor], float] = Tensor.item


def _fine_powers(images: Tensor, originals: Tensor) -> Tensor:
    return torch.stack([fine_power(images), fine_power(originals)], dim=1)


PIXEL_METRICS = {
    "PSNR": PixelMetric(psnr, "PSNR", 2, "↑"),
    "PSNR_pooled": PixelMetric(mse, "", 2, "↑", pool=lambda mean: pooled_psnr(mean.item())),
    "SSIM": PixelMetric(ssim, "SSIM", 4, "↑"),
    "MSE": PixelMetric(lambda images, originals: 1000 * mse(images, originals), "", 4, "↓"),
    "MAE": PixelMetric(mae, "", 4, "↓"),
    "power_ratio": PixelMetric(
        _fine_powers, "fine power", 3, "→ 1", pool=lambda means: means[0].item() / max(means[1].item(), 1e-12)
    ),
}
"""Key of a result -> figure: MSE in thousandths, MAE in units of [0, 1], power_ratio of frequencies above 1/4 cycle per
pixel to the originals'."""
