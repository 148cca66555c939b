import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ssdd.engine.fidelity import (
    FeatureStatistics,
    Statistics,
    copy_rate,
    frechet_distance,
    precision_recall,
)
from ssdd.engine.kid import _resample_counts, kernel_bootstrap, kernel_distance

REPOSITORY = Path(__file__).parents[2]


def normal(n, dim, seed=0, shift=0.0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def statistics_of(features, batch_size=1000, keep_features=True):
    collected = FeatureStatistics(features.shape[1], keep_features)
    indices = torch.arange(len(features))
    for rows, own in zip(features.split(batch_size), indices.split(batch_size), strict=True):
        collected.update(rows, own)
    return collected.compute()


def gaussian(mean, cov):
    return Statistics(10**6, torch.tensor(mean).double(), torch.tensor(cov).double())


# Collecting


@pytest.mark.parametrize("keep_features", [True, False])
def test_statistics_are_mean_and_sample_covariance_in_float64(keep_features):
    features = normal(200, 5) * torch.arange(1, 6) + 100
    collected = statistics_of(features, keep_features=keep_features)
    assert collected.count == 200 and collected.mean.dtype == collected.cov.dtype == torch.float64
    assert collected.mean.numpy() == pytest.approx(features.double().numpy().mean(axis=0), rel=1e-12)
    assert collected.cov.numpy() == pytest.approx(np.cov(features.double().numpy(), rowvar=False), rel=1e-7)
    assert (collected.features is not None) == keep_features


def test_the_outcome_does_not_depend_on_the_batches_in_any_bit():
    features = normal(100, 6)
    whole, pieces = statistics_of(features), statistics_of(features, batch_size=7)
    assert torch.equal(whole.mean, pieces.mean) and torch.equal(whole.cov, pieces.cov)
    assert torch.equal(whole.features, features)


def test_the_outcome_does_not_depend_on_the_order_of_arrival_in_any_bit():
    features = normal(100, 6)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    shuffled = FeatureStatistics(6)
    shuffled.update(features[order], order)
    whole, other = statistics_of(features), shuffled.compute()
    assert torch.equal(whole.mean, other.mean) and torch.equal(whole.cov, other.cov)
    assert torch.equal(other.features, features)


@pytest.mark.parametrize("keep_features", [True, False])
def test_an_image_that_comes_twice_counts_once(keep_features):
    features = normal(10, 3)
    collected = FeatureStatistics(3, keep_features)
    collected.update(features[:6], torch.arange(6))
    collected.update(features[[5, 6, 7, 8, 9, 9]], torch.tensor([5, 6, 7, 8, 9, 9]))
    expected = statistics_of(features, keep_features=keep_features)
    assert collected.compute().count == 10
    assert torch.allclose(collected.compute().cov, expected.cov, atol=1e-12)


def test_wrong_shapes_too_few_images_and_broken_features_are_errors():
    collected = FeatureStatistics(3)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        collected.update(normal(2, 4), torch.arange(2))
    with pytest.raises(ValueError, match="at least 2"):
        collected.compute()
    collected.update(torch.tensor([[1.0, 2, 3], [1, float("nan"), 3]]), torch.arange(2))
    with pytest.raises(ValueError, match="finite"):
        collected.compute()


def test_reduce_in_a_single_process_changes_nothing():
    collected = FeatureStatistics(3)
    collected.update(normal(4, 3), torch.arange(4))
    collected.reduce()
    collected.update(normal(2, 3, seed=1), torch.tensor([4, 5]))
    assert collected.compute().count == 6


TWO_PROCESSES = """
import json, sys
import torch
from torch import distributed
from ssdd.engine.fidelity import FeatureStatistics

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
padding = [0] if rank == 1 else []  # the second process has one image less, and a repeated one to make up for it

def collect(keep_features, padding):
    collected = FeatureStatistics(3, keep_features)
    for indices in torch.tensor([*range(rank, 7, 2), *padding]).split(2):
        collected.update(features[indices], indices)
    collected.reduce()
    statistics = collected.compute()
    return [statistics.count, statistics.mean.tolist(), statistics.cov.tolist()]

outcome = {"features": collect(True, padding), "sums": collect(False, [])}
try:
    collect(False, padding)
except ValueError as problem:
    outcome["padded sums"] = str(problem)
print(json.dumps(outcome))
distributed.destroy_process_group()
"""


def test_two_processes_together_see_what_one_sees(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for outcome in [json.loads(process.communicate(timeout=120)[0]) for process in processes]:
        whole = statistics_of(normal(7, 3))
        assert outcome["features"] == [7, whole.mean.tolist(), whole.cov.tolist()]
        count, mean, cov = outcome["sums"]
        assert count == 7
        assert np.array(mean) == pytest.approx(whole.mean.numpy(), abs=1e-12)
        assert np.array(cov) == pytest.approx(whole.cov.numpy(), abs=1e-12)
        assert "two processes have the same image" in outcome["padded sums"]


# Frechet distance


def test_frechet_distance_of_one_dimensional_gaussians_is_the_closed_form():
    a, b = gaussian([1.0], [[4.0]]), gaussian([3.5], [[0.25]])
    assert frechet_distance(a, b) == pytest.approx(2.5**2 + (2 - 0.5) ** 2)


def test_frechet_distance_of_two_dimensional_gaussians_is_the_closed_form():
    cov_a, cov_b = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    product = cov_a @ cov_b  # the eigenvalues l1, l2 of a 2 x 2 matrix obey (sqrt l1 + sqrt l2)^2 = trace + 2 sqrt det
    root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 1 + 4 + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace
    assert frechet_distance(gaussian([0, 0], cov_a), gaussian([1, 2], cov_b)) == pytest.approx(expected)


def test_frechet_distance_agrees_with_torch_fidelity():
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    a, b = statistics_of(normal(300, 20)), statistics_of(normal(200, 20, seed=1) * 1.5 + 0.3)
    theirs = fid_statistics_to_metric(*({"mu": s.mean.numpy(), "sigma": s.cov.numpy()} for s in (a, b)), verbose=False)[
        "frechet_inception_distance"
    ]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(theirs, rel=1e-9)


def test_frechet_distance_to_itself_is_zero_and_never_negative_and_too_few_images_are_warned_of():
    few = statistics_of(normal(8, 30))
    with pytest.warns(UserWarning, match="8 images in 30 dimensions"):
        assert 0 <= frechet_distance(few, few) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = statistics_of(normal(50, 3))
        assert frechet_distance(enough, enough) == pytest.approx(0, abs=1e-9)


# KID


def test_kernel_distance_agrees_with_torch_fidelity_on_a_full_size_subset():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = normal(60, 16).double(), normal(60, 16, seed=1, shift=0.4).double()
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kernel_distance(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)


def test_kernel_distance_is_what_its_definition_says_for_sets_of_unequal_size():
    x, y = normal(5, 4).double().numpy(), normal(7, 4, seed=1).double().numpy()

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    def off_diagonal(s):
        return np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])

    expected = off_diagonal(x) + off_diagonal(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_unbiased_where_the_frechet_distance_is_not():
    values = [kernel_distance(normal(30, 8, seed=2 * i), normal(30, 8, seed=2 * i + 1)) for i in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)
    assert min(values) < 0


def test_blocks_of_rows_do_not_change_any_measure(monkeypatch):
    from ssdd.engine import fidelity, kid

    x, y, z = normal(50, 6), normal(40, 6, seed=1), normal(30, 6, seed=2)

    def everything():
        estimate = kernel_bootstrap({"x": x}, y, resamples=5)["x"]
        return [kernel_distance(x, y), *estimate.resampled, *precision_recall(x, y), *copy_rate(x, y, z)]

    whole = everything()
    for module in (fidelity, kid):
        monkeypatch.setattr(module, "ROWS", 7)
    assert everything() == pytest.approx(whole, rel=1e-10)


def test_the_bootstrap_reports_the_plain_value_inside_its_interval():
    x, y = normal(80, 8, shift=0.3), normal(100, 8, seed=1)
    estimate = kernel_bootstrap({"x": x}, y, resamples=200)["x"]
    assert estimate.value == pytest.approx(kernel_distance(x, y), rel=1e-12)
    assert estimate.low < estimate.value < estimate.high and estimate.low > 0
    assert estimate.resampled.shape == (200,)
    assert estimate.deviation == pytest.approx(np.std(estimate.resampled, ddof=1))


def test_a_resample_is_a_u_statistic_over_pairs_of_different_images():
    x, y = normal(6, 3).double(), normal(5, 3, seed=1).double()
    w = _resample_counts(6, 4, seed=9, role="set").numpy()
    v = _resample_counts(5, 4, seed=9, role="reference").numpy()
    assert (w.sum(axis=1) == 6).all() and (v.sum(axis=1) == 5).all()

    def mean(a, b, weights_a, weights_b, different):
        kernel = ((a @ b.T / 3 + 1) ** 3).numpy()
        weights = np.outer(weights_a, weights_b)
        if different:
            np.fill_diagonal(weights, 0)
        return (kernel * weights).sum() / weights.sum()

    resampled = kernel_bootstrap({"x": x}, y, resamples=4, seed=9)["x"].resampled
    for r in range(4):
        within = mean(x, x, w[r], w[r], True) + mean(y, y, v[r], v[r], True)
        assert resampled[r] == pytest.approx(within - 2 * mean(x, y, w[r], v[r], False), rel=1e-10)


def test_sets_of_equal_size_are_resampled_together():
    x, y = normal(60, 8, shift=0.2), normal(60, 8, seed=1)
    estimates = kernel_bootstrap({"a": x, "same": x.clone(), "near": x + 0.01, "shuffled": x.flip(0)}, y)
    assert np.array_equal(estimates["a"].resampled, estimates["same"].resampled)
    paired = np.std(estimates["near"].resampled - estimates["a"].resampled)
    unpaired = np.std(estimates["shuffled"].resampled - estimates["a"].resampled)
    assert paired < 0.2 * unpaired


def test_the_bootstrap_does_not_depend_on_which_other_sets_are_compared():
    x, y = normal(40, 8), normal(50, 8, seed=1)
    alone = kernel_bootstrap({"x": x}, y, resamples=10)["x"].resampled
    beside = kernel_bootstrap({"z": normal(30, 8, seed=2), "x": x}, y, resamples=10)["x"].resampled
    other_seed = kernel_bootstrap({"x": x}, y, resamples=10, seed=1)["x"].resampled
    assert np.array_equal(alone, beside) and not np.array_equal(alone, other_seed)


def test_the_bootstrap_deviation_is_that_of_fresh_samples():
    fresh = [
        kernel_distance(normal(60, 4, seed=3 * i, shift=0.5), normal(60, 4, seed=3 * i + 1)) for i in range(1, 200)
    ]
    deviations = [
        kernel_bootstrap({"x": normal(60, 4, seed=3 * i, shift=0.5)}, normal(60, 4, seed=3 * i + 1), resamples=100)[
            "x"
        ].deviation
        for i in range(1, 20)
    ]
    assert np.mean(deviations) == pytest.approx(np.std(fresh), rel=0.25)


# Precision, recall, copies


def covered_by_definition(points, centres, k):
    def distance(a, b):
        return np.sqrt(((a - b) ** 2).sum())

    inside = 0
    for point in points:
        for i, centre in enumerate(centres):
            radius = sorted(distance(centre, other) for j, other in enumerate(centres) if j != i)[k - 1]
            if distance(point, centre) <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_what_their_definitions_say(k):
    real, generated = normal(25, 3).double(), normal(18, 3, seed=1).double() * 1.3 + 0.4
    precision, recall = precision_recall(real, generated, k)
    assert precision == pytest.approx(covered_by_definition(generated.numpy(), real.numpy(), k))
    assert recall == pytest.approx(covered_by_definition(real.numpy(), generated.numpy(), k))


def test_narrow_samples_are_precise_and_far_ones_neither():
    real = normal(200, 4)
    precision, recall = precision_recall(real, normal(200, 4, seed=1) * 0.2)
    assert precision > 0.95 and recall < 0.5
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(real, real[:3])


def test_copies_of_training_images_are_told_from_fresh_ones():
    train, heldout = normal(300, 6), normal(200, 6, seed=1)
    copied, chance = copy_rate(train[:100] + 0.01 * normal(100, 6, seed=2), train, heldout)
    fresh, same_chance = copy_rate(normal(200, 6, seed=3), train, heldout)
    assert copied > 0.97 and chance == same_chance < 0.7 and abs(fresh - chance) < 0.12
