"""Test-time crops, one table: SSDD's (arXiv 2510.04961) and that of ADM's ImageNet references (arXiv 2105.05233)."""

from __future__ import annotations

from PIL import Image


def resize_short_side(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resize so that the shorter side is `size` pixels, keeping the aspect ratio (rounded down, as torchvision)."""
    width, height = image.size
    shorter = min(width, height)
    return image.resize((size * width // shorter, size * height // shorter), resample)


def resize_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop of SSDD: bilinear short side, centre crop."""
    image = resize_short_side(image, size, Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop of ADM and DiT: halve with a box filter while possible, bicubic to `size`, centre crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


CROPS = {"resize": resize_crop, "adm": adm_crop}
"""Name -> (picture, side) -> square picture of that side."""
