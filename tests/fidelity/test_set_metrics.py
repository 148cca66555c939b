"""Scores of image sets on Gaussian features whose distances are known."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssdd.engine.processes import Processes
from ssdd.fidelity import features as features_module
from ssdd.fidelity.features import FeatureNetwork, Outputs, load_networks
from ssdd.fidelity.frechet import frechet_distance
from ssdd.fidelity.kid import KernelEstimate, kernel_distance
from ssdd.fidelity.measure import measure
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.set_metrics import compare, drawn, frechet_floor, paired_differences

DIM = 3
ALONE = Processes(0, 1, torch.device("cpu"))


def gaussian(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)) + shift


def statistics(features: Tensor) -> Statistics:
    return Statistics(len(features), features.double().mean(0), torch.cov(features.double().T), features)


class ChannelMeans(nn.Module):
    """uint8 [n, 3, h, w] -> [n, 3]."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.fixture
def sets() -> dict[str, Statistics]:
    """Originals, the same moved by 2 in every dimension, and other real images."""
    originals = gaussian(120, seed=0)
    return {
        "originals": statistics(originals),
        "same": statistics(originals.clone()),
        "moved": statistics(originals + 2),
        "far": statistics(originals + 50),
        "reals": statistics(gaussian(150, seed=1)),
    }


def test_frechet_of_moved_features_is_the_squared_way(sets):
    rows, kernels = compare(sets, ["same", "moved", "far"], "originals", None, resamples=10, seed=0)
    assert kernels == {} and all(set(row) == {"frechet"} for row in rows.values())
    assert rows["same"]["frechet"] == pytest.approx(0, abs=1e-9)
    assert rows["moved"]["frechet"] == pytest.approx(DIM * 2**2, rel=1e-6)
    assert rows["far"]["frechet"] == pytest.approx(DIM * 50**2, rel=1e-6)


def test_kernel_scores_are_to_the_other_real_images(sets):
    rows, kernels = compare(sets, ["same", "moved", "far"], "originals", "reals", resamples=100, seed=0)
    for name, row in rows.items():
        assert row["kid"] == pytest.approx(kernel_distance(sets[name].features, sets["reals"].features), rel=1e-9)
        assert row["kid_low"] < row["kid_high"] and row["kid_deviation"] > 0
        assert (row["kid"], row["kid_low"], row["kid_high"]) == (
            kernels[name].value,
            kernels[name].low,
            kernels[name].high,
        )
    assert rows["same"]["kid_low"] < 0.1 < rows["moved"]["kid_low"] < rows["far"]["kid_low"]
    assert rows["same"]["precision"] > 0.7 and rows["same"]["recall"] > 0.7
    assert (rows["far"]["precision"], rows["far"]["recall"]) == (0, 0)


def test_precision_and_recall_are_left_out_on_demand_and_change_nothing_else(sets):
    full, less = (compare(sets, ["moved"], "originals", "reals", 10, 0, slow=p)[0] for p in (True, False))
    assert (
        less["moved"] == {k: v for k, v in full["moved"].items() if k not in ("precision", "recall")} != full["moved"]
    )


def test_the_frechet_distance_is_to_the_originals_also_beside_other_real_images(sets):
    rows, _ = compare(sets, ["moved"], "originals", "reals", resamples=10, seed=0)
    assert rows["moved"]["frechet"] == pytest.approx(DIM * 2**2, rel=1e-6)


def test_a_row_that_collapses_onto_one_real_image_is_precise_and_recalls_little(sets):
    one = sets["reals"].features[:1]
    sets["collapsed"] = statistics(one + 1e-3 * gaussian(40, seed=2))
    rows, _ = compare(sets, ["collapsed"], "originals", "reals", resamples=10, seed=0)
    assert rows["collapsed"]["precision"] == 1 and rows["collapsed"]["recall"] < 0.1


def test_scores_repeat_with_their_seed_and_intervals_move_with_another(sets):
    first, again, other = (compare(sets, ["moved"], "originals", "reals", 50, seed)[0]["moved"] for seed in (0, 0, 1))
    assert first == again
    assert other["kid"] == first["kid"] and other["kid_low"] != first["kid_low"]


def test_too_few_images_for_a_frechet_distance_are_left_to_the_caller_to_mention():
    few = {"originals": statistics(gaussian(3, seed=0)), "row": statistics(gaussian(3, seed=1))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(few, ["row"], "originals", None, resamples=10, seed=0)


def test_paired_differences_name_each_pair_once_and_are_zero_for_equal_sets(sets):
    sets["twin"] = sets["same"]
    rows = ["same", "twin", "moved"]
    _, kernels = compare(sets, rows, "originals", "reals", resamples=100, seed=0)
    differences = paired_differences(kernels, rows)
    assert list(differences) == ["same - twin", "same - moved", "twin - moved"]
    assert differences["same - twin"] == {"kid": 0, "low": 0, "high": 0}
    worse = differences["same - moved"]
    assert worse["kid"] == kernels["same"].value - kernels["moved"].value
    assert worse["low"] < worse["high"] < 0
    assert paired_differences(kernels, ["same"]) == {}


def test_noise_that_two_rows_share_cancels_in_their_difference():
    noise = np.linspace(-1, 1, 101)
    a, b = (KernelEstimate(v, v - 1, v + 1, 0.6, v + noise) for v in (0.75, 0.5))
    assert paired_differences({"a": a, "b": b}, ["a", "b"]) == {
        "a - b": {"kid": 0.25, "low": pytest.approx(0.25), "high": pytest.approx(0.25)}
    }


def test_sets_are_collected_in_any_order_and_every_image_once():
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = FeatureNetwork("means", DIM, "", ChannelMeans())
    parts = [(images[batch], torch.tensor(batch)) for batch in ([7, 8, 9], [0, 1, 2, 3], [3, 4, 5, 6])]
    row, originals = (measure(own, [network], ALONE)["means"] for own in (parts, [(images, torch.arange(10))]))
    assert row.count == 10 and torch.equal(row.features, images.float().mean(dim=(2, 3)))
    assert torch.equal(row.mean, originals.mean) and torch.equal(row.cov, originals.cov)


class EveryOutput(nn.Module):
    """Channel means as features and as logits, the first pixel as spatial features."""

    def forward(self, images: Tensor) -> Outputs:
        means = images.float().mean(dim=(2, 3))
        return Outputs(means, means, images[:, :, 0, 0].float())


@pytest.mark.parametrize("keep_features", [True, False])
def test_spatial_distance_and_inception_score_need_no_kept_features(keep_features):
    images = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = images.flip(3).clamp(max=250)
    network = FeatureNetwork("every", DIM, "", EveryOutput(), classes=3, spatial_dim=3)
    sets = {
        name: measure([(pixels, torch.arange(40))], [network], ALONE, keep_features)["every"]
        for name, pixels in (("row", images), ("reals", other))
    }
    row = compare(sets, ["row"], "reals", "reals", resamples=5, seed=0)[0]["row"]
    corners = [statistics(pixels[:, :, 0, 0].float()) for pixels in (images, other)]
    assert row["spatial_frechet"] == pytest.approx(frechet_distance(*corners), rel=1e-9)
    p = images.double().mean(dim=(2, 3)).softmax(dim=1)
    expected = (p * (p.log() - p.mean(dim=0).log())).sum(dim=1).mean().exp().item()
    assert row["inception_score"] == pytest.approx(expected, rel=1e-6)
    assert ("kid" in row) == ("precision" in row) == keep_features
    assert (sets["row"].features is not None) == keep_features and sets["row"].spatial.features is None


def test_the_floor_is_the_distance_of_disjoint_real_parts_of_the_samples_count():
    reals = statistics(gaussian(1000, seed=0))
    value, counts = frechet_floor(reals, 100)
    assert counts == (100, 900) and 0 < value < 0.2
    assert frechet_floor(reals, 100) == (value, counts)
    larger, counts = frechet_floor(reals, 10**6)
    assert counts == (500, 500) and larger < value
    assert frechet_floor(Statistics(1000, reals.mean, reals.cov), 100) is None


def test_a_part_of_the_images_is_always_the_same_part_in_their_order():
    features = torch.arange(20.0)[:, None]
    part = drawn(features, 7)
    assert torch.equal(part, drawn(features, 7)) and torch.equal(part, part.sort(dim=0).values)
    assert len(part.unique()) == 7 and drawn(features, 20) is features


def test_auto_stands_for_the_networks_that_are_here_and_no_network_is_loaded_twice(monkeypatch):
    monkeypatch.setattr(features_module, "load_features", lambda name, device: name)
    monkeypatch.setattr(features_module, "has", lambda name: name == "efficientnet_lite0")
    assert load_networks(["auto"], "cpu") == ["efficientnet_lite0"]
    assert load_networks(["inception", "auto", "efficientnet_lite0"], "cpu") == ["inception", "efficientnet_lite0"]
    monkeypatch.setattr(features_module, "has", lambda name: False)
    assert load_networks(["auto"], "cpu") == [] and load_networks([], "cpu") == []
