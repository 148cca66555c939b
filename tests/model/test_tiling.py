"""Tiles: weights add up to one, local functions leave no seam, and slices change nothing."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

from ssdd import SSDD
from ssdd.model.tiling import blend, tile_image, tile_with_halo


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65 * 8, 40), (200, 328)])
def test_weights_add_up_to_one_and_edges_are_on_the_grid(height, width):
    tiles = tile_image(height, width, side=64, overlap=32, multiple=8)
    total = torch.zeros(height, width)
    for tile in tiles:
        total[tile.rows, tile.columns] += tile.weight
        edges = [tile.rows.start, tile.rows.stop, tile.columns.start, tile.columns.stop]
        assert all(edge % 8 == 0 for edge in edges)
        assert max(tile.weight.shape) <= 64 and tile.weight.min() >= 0
    assert (total - 1).abs().max() < 1e-6


def test_a_function_that_sees_less_than_a_quarter_of_the_overlap_leaves_no_seam():
    image = torch.randn(1, 1, 200, 136)
    kernel = torch.randn(1, 1, 17, 17)  # sees 8 pixels around
    tiles = tile_image(200, 136, side=64, overlap=32, multiple=8)
    whole = F.conv2d(image, kernel, padding=8)
    tiled = blend(tiles, lambda t: F.conv2d(image[..., t.rows, t.columns], kernel, padding=8), image)
    assert len(tiles) > 4 and (tiled - whole).abs().max() < 1e-4


def test_tiles_that_would_not_advance_are_refused(tokenizer):
    with pytest.raises(ValueError, match="do not advance"):
        tile_image(100, 100, side=32, overlap=32, multiple=8)
    with pytest.raises(ValueError, match="do not advance"):
        tokenizer.enable_tiling(tile=64, overlap=64)


def test_small_images_are_decoded_whole_and_large_ones_nearly_as_whole(tokenizer):
    z, noise = torch.randn(1, 2, 12, 6), torch.randn(1, 3, 96, 48)
    whole = tokenizer.decode(z, steps=2, noise=noise)
    tokenizer.enable_tiling(tile=96, overlap=32)
    assert torch.equal(tokenizer.decode(z, steps=2, noise=noise), whole)
    tokenizer.enable_tiling(tile=64, overlap=32)
    tiled = tokenizer.decode(z, steps=2, noise=noise)
    assert 0 < (tiled - whole).abs().mean() < 0.1 * whole.std()
    tokenizer.enable_tiling(None)
    assert torch.equal(tokenizer.decode(z, steps=2, noise=noise), whole)


def test_slices_give_the_images_of_the_whole_batch(tokenizer):
    x, noise = torch.rand(3, 3, 16, 16), torch.randn(3, 3, 16, 16)
    z = tokenizer.encode(x).mode()
    whole = tokenizer.decode(z, steps=2, noise=noise)
    tokenizer.enable_slicing(2)
    assert (tokenizer.encode(x).mode() - z).abs().max() < 1e-5
    assert (tokenizer.decode(z, steps=2, noise=noise) - whole).abs().max() < 1e-5


def test_a_deterministic_decoder_is_tiled_too_and_tiles_share_no_memory_of_the_whole():
    model = SSDD({"name": "f8c2", "width": 8}, {"size": "kl", "width": 8})
    z = torch.randn(1, 2, 16, 24)
    whole, seen = model.decode(z), []
    handle = model.decoder.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape[2:])))
    model.enable_tiling(64, 32)
    tiled = model.decode(z)
    handle.remove()
    assert len(seen) > 1 and set(seen) == {(64, 64)}
    assert tiled.shape == whole.shape and (tiled - whole).abs().mean() < 0.5 * whole.std()


def test_only_one_tiles_conditions_exist_at_a_time(tokenizer):
    alive, most = weakref.WeakSet(), 0
    condition = tokenizer.decoder.condition

    def counted(*args, **options):
        nonlocal most
        made = condition(*args, **options)
        alive.add(made.z_input)
        most = max(most, len(alive))
        return made

    tokenizer.decoder.condition = counted
    tokenizer.enable_tiling(64, 32)
    tokenizer.decode(torch.randn(1, 2, 16, 16), steps=2)
    assert most <= 2  # the next one is made before the last one's name is bound anew


@pytest.mark.parametrize(("height", "width"), [(64, 64), (200, 136), (8, 1000), (72, 328)])
def test_interiors_of_tiles_with_a_halo_are_the_image_once(height, width):
    tiles = tile_with_halo(height, width, 64, 20, 8)
    count = torch.zeros(height, width)
    for tile in tiles:
        assert tile.rows.start % 8 == tile.rows.stop % 8 == tile.columns.start % 8 == tile.columns.stop % 8 == 0
        assert tile.weight.shape == (tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start)
        count[tile.rows, tile.columns] += tile.weight
    assert torch.equal(count, torch.ones(height, width))


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_tiles_of_a_fast_decoder_are_exact(stride, steps, dtype, tolerance):
    size = {"size": "F-XS", "width": 16, "depth": 2, "thin": [8, 8, 4], "coarse_depth": 1, "statistics": True}
    torch.manual_seed(0)
    model = SSDD({"name": f"f{stride}c4", "width": 8}, size).to(dtype).eval()
    for name, parameter in model.decoder.named_parameters():
        if name.startswith(("conv_out", "base", "statistics", "modulation")):  # they start at zero
            torch.nn.init.normal_(parameter, std=0.1)
    height, width = 25 * 16, 9 * 16
    z = torch.randn(2, 4, height // stride, width // stride, dtype=dtype)
    noise = torch.randn(2, 3, height, width, dtype=dtype)
    seen, condition = [], model.decoder.condition
    model.decoder.condition = lambda z, *args, **options: seen.append(z.shape) or condition(z, *args, **options)
    whole = model.decode(z, steps, noise)
    model.enable_tiling(64)
    tiled = model.decode(z, steps, noise)
    assert len(seen) == 1 + steps * 7 * 3
    assert whole.dtype == dtype and whole.std() > 0.1
    torch.testing.assert_close(tiled, whole, rtol=0, atol=tolerance)
