import io

import numpy as np
import torch
from PIL import Image

from ssdd.engine.png import png_bytes, save_png
from ssdd.images.pixels import from_uint8, grid, to_uint8


def test_all_256_grey_levels_survive_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_conversion_rounds_and_clamps():
    just_below_128 = 127.5 / 127.5 - 1 - 0.4 / 127.5  # pixel value 127.1
    just_above_127 = 127.6 / 127.5 - 1
    values = torch.tensor([-3.0, -1.0, just_below_128, just_above_127, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 127, 128, 255, 255]


def test_pixels_map_to_minus_one_and_one():
    assert from_uint8(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_half_precision_images_are_converted_in_float32():
    values = torch.linspace(-1, 1, 999).bfloat16()
    assert torch.equal(to_uint8(values), to_uint8(values.float()))


def test_grid_lays_images_out_row_by_row_on_white():
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 5)
    sheet = grid(images, columns=2, gap=1)
    assert sheet.shape == (2 * 4 + 1, 2 * 5 + 1, 3)
    assert (sheet[:4, :5] == 0).all() and (sheet[:4, 6:] == 1).all() and (sheet[5:, :5] == 2).all()
    assert (sheet[5:, 6:] == 255).all() and (sheet[4] == 255).all()


def test_grid_enlarges_without_smoothing_and_accepts_grey_images():
    sheet = grid(torch.tensor([[[[0, 200]]]], dtype=torch.uint8), columns=4, scale=3)
    assert sheet.shape == (3, 6, 3)
    assert (sheet[:, :3] == 0).all() and (sheet[:, 3:] == 200).all()


def test_png_holds_the_very_pixels(tmp_path):
    picture = np.random.RandomState(0).randint(0, 256, (7, 9, 3)).astype(np.uint8)
    save_png(tmp_path / "new" / "picture.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "picture.png")), picture)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(picture)))), picture)
    assert png_bytes(picture) == png_bytes(picture.copy())
