"""Noise by position: known answers of the generator, parts equal to the whole, distribution."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from ssdd.model.positional_noise import philox, positional_noise


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_philox(counter, key, words):
    """The test vectors that Random123 (Salmon et al. 2011) publishes."""
    found = philox(tuple(torch.tensor(word) for word in counter), tuple(key))
    assert [int(word) for word in found] == words


def test_a_part_draws_what_the_whole_does():
    whole = positional_noise(7, range(40), range(60))
    assert torch.equal(positional_noise(7, range(11, 25), range(30, 60)), whole[:, 11:25, 30:60])


def test_seed_and_image_change_all_of_it():
    images = [
        positional_noise(seed, range(32), range(32), index) for seed, index in ((0, 0), (1, 0), (2**40, 0), (0, 1))
    ]
    flat = torch.stack([image.flatten() for image in images])
    assert float((flat.corrcoef() - torch.eye(4)).abs().max()) < 0.06  # 3 072 numbers: deviation 0.018


def test_it_is_standard_normal_and_white():
    noise = positional_noise(3, range(512), range(512))
    assert all(stats.kstest(channel.flatten().numpy(), "norm").pvalue > 1e-3 for channel in noise)
    assert float((noise.flatten(1).corrcoef() - torch.eye(3)).abs().max()) < 0.01
    neighbours = [(noise[:, 1:] * noise[:, :-1]).mean((1, 2)), (noise[..., 1:] * noise[..., :-1]).mean((1, 2))]
    assert float(torch.stack(neighbours).abs().max()) < 0.01
