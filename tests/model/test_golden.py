"""The tokenizer reproduces the reference numbers of the published architecture."""

from __future__ import annotations

import csv

import pytest
import torch

from ssdd import SSDD
from ssdd.model.decoder import DECODER_SIZES, UViTDecoder
from ssdd.model.encoder import Encoder
from ssdd.model.flow import interpolate
from tests.golden import DATA, fill_state_dict, load_case

CASES = [("f8c4", "XS", 64, (1, 4)), ("f16c4", "S", 128, (2,)), ("f8c4", "M", 128, (1,))]


@pytest.mark.parametrize(("encoder", "decoder", "size", "steps"), CASES)
def test_outputs_equal_the_reference(encoder, decoder, size, steps):
    case = load_case(f"ssdd_{encoder}_{decoder}_{size}")
    model = SSDD(encoder, decoder).eval()
    model.load_state_dict(fill_state_dict(model.state_dict()))
    x, noise, t = case["in.x"], case["in.noise"], case["in.t"]
    with torch.no_grad():
        posterior = model.encode(x)
        velocity = model.decoder(interpolate(x, noise, t), t, posterior.mode())
    for name, value, tolerance in [
        ("mean", posterior.mean, 2e-4),
        ("logvar", posterior.logvar, 2e-4),
        ("kl", posterior.kl(), 2e-3),
        ("v", velocity, 2e-4),
        *((f"decode_{n}", model.decode(posterior.mode(), steps=n, noise=noise), 2e-4) for n in steps),
    ]:
        assert (value - case[f"out.{name}"]).abs().max() <= tolerance, name


@pytest.mark.parametrize("encoder", ["f8c4", "f16c4"])
def test_state_dict_has_the_published_keys_and_shapes_in_order(encoder):
    with torch.device("meta"):
        model = SSDD(encoder, "S")
    ours = [(key, str(tuple(value.shape)), "float32") for key, value in model.state_dict().items()]
    with (DATA / f"keys_{encoder}_S.tsv").open() as file:
        assert ours == [tuple(row) for row in csv.reader(file, delimiter="\t")]


PARAMETERS = {
    "XS": 4_996_611,
    "S": 14_057_059,
    "B": 21_140_459,
    "M": 50_280_147,
    "L": 90_759_939,
    "XL": 161_272_835,
    "H": 362_688_003,
    "XH": 644_622_339,
    "G": 1_450_019_715,
}


@pytest.mark.parametrize("size", [size for size in DECODER_SIZES if size != "XXS"])
def test_decoder_parameter_counts(size):
    with torch.device("meta"):
        decoder = UViTDecoder(size, z_dim=4)
    assert sum(p.numel() for p in decoder.parameters()) == PARAMETERS[size]


@pytest.mark.parametrize(
    ("stride", "channels", "count"),
    [(8, 4, 34_163_664), (16, 16, 46_078_400), (32, 64, 58_339_456), (8, 16, 34_275_264), (4, 3, 22_351_280)],
)
def test_encoder_parameter_counts(stride, channels, count):
    with torch.device("meta"):
        encoder = Encoder(stride, channels)
    assert sum(p.numel() for p in encoder.parameters()) == count
