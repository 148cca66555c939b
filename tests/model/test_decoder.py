"""The decoder beyond the published sizes: any shape, fine latents, what its inputs reach."""

from __future__ import annotations

import pytest
import torch

from ssdd.model.decoder import DECODER_SIZES, UViTDecoder
from ssdd.model.norms import modulate


@pytest.mark.parametrize(
    ("side", "latent"), [((8, 8), (1, 1)), ((16, 40), (4, 10)), ((72, 64), (9, 8)), ((24, 16), (3, 2))]
)
def test_any_sides_that_are_multiples_of_8_work_also_with_a_latent_finer_than_the_middle(side, latent):
    decoder = UViTDecoder("XXS", z_dim=3)
    v = decoder(torch.randn(2, 3, *side), torch.rand(2), torch.randn(2, 3, *latent))
    assert v.shape == (2, 3, *side) and v.dtype == torch.float32


def test_at_the_start_the_output_depends_on_image_and_latent_but_not_on_time():
    decoder = UViTDecoder("XXS", z_dim=2)
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 2, 2, 2)
    assert torch.equal(decoder(x, 0.1, z), decoder(x, 0.9, z))
    assert not torch.equal(decoder(x, 0.1, z), decoder(x + 1, 0.1, z))
    assert not torch.equal(decoder(x, 0.1, z), decoder(x, 0.1, z + 1))


def test_one_time_for_all_equals_a_time_an_image(tokenizer):
    x, z = torch.randn(3, 3, 16, 16), torch.randn(3, 2, 2, 2)
    with torch.no_grad():
        one, each = (tokenizer.decoder(x, t, z) for t in (0.3, torch.full((3,), 0.3)))
    assert torch.allclose(one, each, atol=1e-5)


def test_block_modulation_equals_modulation_at_pixel_size():
    x, scale, shift = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 3, 2), torch.randn(2, 4, 3, 2)
    scale_pixels, shift_pixels = (torch.nn.functional.interpolate(m, size=(6, 8)) for m in (scale, shift))
    assert torch.allclose(modulate(x, scale, shift), x * (1 + scale_pixels) + shift_pixels, atol=1e-6)


def test_the_small_size_keeps_64_values_a_group_at_16_pixels():
    size = DECODER_SIZES["XXS"]
    for level, channels in enumerate(size.levels):
        assert channels // size.groups * (16 >> level) ** 2 >= 16 and channels % size.groups == 0


def test_wrong_sides_and_channels_are_named():
    decoder = UViTDecoder("XXS", z_dim=2)
    with pytest.raises(ValueError, match="multiples of 8, got 12x16"):
        decoder(torch.zeros(1, 3, 12, 16), 0.5, torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="2 channels, got 4"):
        decoder(torch.zeros(1, 3, 16, 16), 0.5, torch.zeros(1, 4, 2, 2))
