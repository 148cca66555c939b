"""Noise depends on what it is for: not on order, batch, process count, or what was drawn before."""

from __future__ import annotations

import pytest
import torch

from ssdd.engine.random import batch_generator, indexed_noise, seed_of


def test_seeds_are_stable_over_versions_and_machines():
    # sha256 of "0\x1fnoise\x1f1", first 8 bytes, shifted into 63 bits.
    assert seed_of(0, "noise", 1) == 8188269915554620730
    assert 0 <= seed_of("a") < 2**63


def test_seeds_tell_apart_every_part_and_its_place():
    parts = [(0, "noise", 1), (1, "noise", 0), (0, "noise", 11), (0, "noise1", 1), (0, "noise"), (0, 1, "noise"), (0,)]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert seed_of(1, 23) != seed_of(12, 3)


def test_a_row_depends_on_its_index_and_not_on_order_or_batch():
    whole = indexed_noise(range(6), (2, 3), seed=0)
    assert whole.shape == (6, 2, 3) and whole.dtype == torch.float32
    order = [4, 0, 5, 2]
    assert torch.equal(indexed_noise(order, (2, 3), seed=0), whole[order])
    assert torch.equal(indexed_noise(torch.tensor(order), (2, 3), seed=0), whole[order])
    batches = [indexed_noise(indices, (2, 3), seed=0) for indices in ([0], [1, 2, 3], [4, 5])]
    assert torch.equal(torch.cat(batches), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 6


def test_seed_and_stream_change_every_row():
    rows = [indexed_noise([3], (4,), seed, stream) for seed, stream in ((0, "noise"), (1, "noise"), (0, "posterior"))]
    assert not any(torch.equal(rows[i], rows[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = indexed_noise([0, 1], (3,), seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(indexed_noise([0, 1], (3,), seed=0), first)


def test_no_index_gives_an_empty_batch_of_the_shape():
    assert indexed_noise([], (3, 2, 2), seed=0).shape == (0, 3, 2, 2)


def test_noise_is_standard_normal_over_indices():
    x = indexed_noise(range(2000), (4,), seed=0)
    assert x.mean().item() == pytest.approx(0, abs=0.05) and x.std().item() == pytest.approx(1, abs=0.03)


def test_a_batch_generator_starts_over_for_the_same_parts_and_differs_for_others():
    def draw(*parts):
        return torch.randn(4, generator=batch_generator("cpu", *parts))

    assert torch.equal(draw(0, "time", 5), draw(0, "time", 5))
    assert not torch.equal(draw(0, "time", 5), draw(0, "time", 6))
