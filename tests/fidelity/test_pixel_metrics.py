import numpy as np
import pytest
import torch

from ssdd.fidelity.pixel_metrics import fine_power, mae, mse, pooled_psnr, psnr, ssim


def random_images(seed, n=2, size=(12, 15)):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (n, 3, *size)).astype(np.uint8))


def ssim_by_definition(a, b):
    """Mean over channels and 7 x 7 windows of the SSIM formula with sample (co)variances."""
    values = []
    for x, y in zip(a.astype(float), b.astype(float), strict=True):
        for top in range(x.shape[0] - 6):
            for left in range(x.shape[1] - 6):
                p, q = (image[top : top + 7, left : left + 7].ravel() for image in (x, y))
                cov = np.cov(p, q, ddof=1)
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                luminance = (2 * p.mean() * q.mean() + c1) / (p.mean() ** 2 + q.mean() ** 2 + c1)
                values.append(luminance * (2 * cov[0, 1] + c2) / (cov[0, 0] + cov[1, 1] + c2))
    return np.mean(values)


def test_psnr_of_a_constant_error_is_known():
    originals = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    images = originals.clone()
    images[0] += 5
    images[1] -= 10
    expected = [10 * np.log10(255**2 / 25), 10 * np.log10(255**2 / 100)]
    assert psnr(images, originals).tolist() == pytest.approx(expected)


def test_psnr_is_one_value_an_image_and_infinite_for_equal_ones():
    a, b = random_images(0), random_images(1)
    b[1] = a[1]
    values = psnr(a, b)
    assert values.shape == (2,) and values.dtype == torch.float64
    assert values[0] < 15 and values[1] == float("inf")


def test_errors_are_what_numpy_says_on_the_scale_of_one():
    a, b = random_images(0), random_images(1)
    difference = a.numpy() / 255 - b.numpy() / 255
    assert mse(a, b).tolist() == pytest.approx((difference**2).mean(axis=(1, 2, 3)).tolist(), rel=1e-12)
    assert mae(a, b).tolist() == pytest.approx(np.abs(difference).mean(axis=(1, 2, 3)).tolist(), rel=1e-12)
    expected = -10 * np.log10((difference**2).mean(axis=(1, 2, 3)))
    assert psnr(a, b).tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_the_pooled_psnr_takes_all_pixels_as_one_image_and_is_finite_beside_a_perfect_one():
    a, b = random_images(0), random_images(1)
    b[1] = a[1]
    pooled = pooled_psnr(mse(a, b).mean().item())
    assert pooled == pytest.approx(-10 * np.log10(((a.numpy() / 255 - b.numpy() / 255) ** 2).mean()), rel=1e-12)
    assert pooled < psnr(a, b).mean() == float("inf") == pooled_psnr(0.0)


def test_ssim_is_what_its_definition_says():
    a = random_images(0)
    b = ((a.float() + random_images(1).float()) / 2).to(torch.uint8)
    expected = [ssim_by_definition(x.numpy(), y.numpy()) for x, y in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_of_equal_images_is_one():
    a = random_images(0)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    flat = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert ssim(flat, flat).item() == pytest.approx(1)


def test_floats_and_unequal_shapes_are_refused():
    a = random_images(0)
    with pytest.raises(ValueError, match="uint8"):
        psnr(a.float(), a.float())
    with pytest.raises(ValueError, match="one shape"):
        psnr(a, a[:1])
    with pytest.raises(ValueError, match="7 px"):
        ssim(a[..., :6], a[..., :6])


def test_fine_power_is_that_of_frequencies_above_a_quarter_cycle_a_pixel():
    def wave(cycles: float) -> torch.Tensor:
        """Columns of a cosine of amplitude 100 around 128."""
        row = 128 + 100 * torch.cos(2 * torch.pi * cycles * torch.arange(32))
        return row.round().to(torch.uint8).expand(1, 3, 32, 32)

    assert fine_power(wave(0.125)).item() < 1  # rounding alone
    fast = fine_power(wave(0.375)).item()
    frequencies = torch.fft.fftfreq(32).abs() > 0.25
    bins = (frequencies[:, None] | frequencies[None]).sum().item()
    assert fast == pytest.approx(100**2 / 2 * 32 * 32 / bins, rel=0.01)  # Parseval: all its power is there
