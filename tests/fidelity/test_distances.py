import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssdd.fidelity.frechet import frechet_distance
from ssdd.fidelity.kid import _resample_counts, kernel_bootstrap, kernel_distance, kernel_distance_of_subsets
from ssdd.fidelity.moments import Statistics
from ssdd.fidelity.neighbours import copy_rate, precision, recall
from tests.fidelity.normal_features import normal, statistics_of


def precision_recall(real, generated, k=3):
    return precision(real, generated, k), recall(real, generated, k)


def gaussian(mean, cov):
    return Statistics(10**6, torch.tensor(mean).double(), torch.tensor(cov).double())


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


def exact_samples(n, mean, cov, seed):
    """n samples whose own mean and covariance are the given ones, to rounding of float32."""
    z = normal(n, len(mean), seed).double()
    z = z - z.mean(dim=0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(z.T)), z.T, upper=False).T
    return (z @ torch.linalg.cholesky(cov).T + mean).float()


def test_frechet_distance_of_samples_of_two_gaussians_is_the_closed_form():
    dim = 12
    draw = normal(2 * dim, dim, seed=3).double()
    basis = torch.linalg.qr(draw[:dim]).Q
    spectra = torch.linspace(0.1, 4, dim).double(), torch.linspace(3, 0.2, dim).double()
    cov_a, cov_b = ((basis * spectrum) @ basis.T for spectrum in spectra)  # they commute, so the root is known
    mean_a, mean_b = draw[dim], draw[dim + 1]
    a = statistics_of(exact_samples(500, mean_a, cov_a, seed=0))
    b = statistics_of(exact_samples(400, mean_b, cov_b, seed=1))
    expected = (mean_a - mean_b).square().sum() + (spectra[0].sqrt() - spectra[1].sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("keep_features", [True, False])
@pytest.mark.parametrize("n, dim", [(50, 3), (130, 64), (40, 64), (8, 30)])
def test_frechet_distance_of_identical_sets_is_zero_and_never_negative(n, dim, keep_features):
    features = normal(n, dim).abs() * torch.logspace(-3, 1, dim)  # a steep spectrum, as of real features
    a, b = (statistics_of(features, size, keep_features) for size in (1000, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if n <= dim else "error")
        distance = frechet_distance(a, b)
    assert 0 <= distance < (1e-6 if n > 2 * dim else 1e-5 * a.cov.trace())


@pytest.mark.parametrize("keep_features", [True, False])
def test_frechet_distance_of_fewer_images_than_dimensions_is_finite_exact_and_warned_of(keep_features):
    dim = 30
    few, other = statistics_of(normal(8, dim)), statistics_of(normal(9, dim, seed=1))
    given = [s if keep_features else replace(s, features=None) for s in (few, other)]
    with pytest.warns(UserWarning, match="[89] images in 30 dimensions"):
        distance = frechet_distance(*given)
    x, y = (s.features.double() - s.mean for s in (few, other))
    cross = torch.linalg.svdvals(x @ y.T).sum() / (7 * 8) ** 0.5  # Tr (A B)^(1/2) of A = X^T X / 7, B = Y^T Y / 8
    expected = (few.mean - other.mean).square().sum() + few.cov.trace() + other.cov.trace() - 2 * cross
    assert distance == pytest.approx(expected.item(), rel=1e-10)


def test_the_frechet_distance_of_few_images_takes_no_eigenvalues_and_of_features_of_a_part_it_does(monkeypatch):
    few, other = (statistics_of(normal(8, 30, seed=seed)) for seed in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = frechet_distance(few, other)
        part = frechet_distance(replace(few, features=few.features[:5]), other)
        monkeypatch.setattr(torch.linalg, "eigh", None)
        assert frechet_distance(few, other) == whole == pytest.approx(part, rel=1e-10)


def test_a_dimension_that_never_varies_is_warned_of_and_adds_nothing():
    features, others = normal(100, 5), normal(100, 5, seed=1)
    features[:, 4] = others[:, 4] = 0.1
    with pytest.warns(UserWarning, match="rank 4 of 5 dimensions"):
        distance = frechet_distance(statistics_of(features), statistics_of(others))
    without = frechet_distance(statistics_of(features[:, :4]), statistics_of(others[:, :4]))
    assert distance == pytest.approx(without, rel=1e-10)


# KID


def test_kernel_distance_agrees_with_torch_fidelity_on_a_full_size_subset():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = normal(60, 16).double(), normal(60, 16, seed=1, shift=0.4).double()
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kernel_distance(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)


def test_kernel_distance_of_subsets_is_torch_fidelitys():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = normal(60, 16).double(), normal(50, 16, seed=1, shift=0.4).double()
    theirs = kid_features_to_metric(x, y, kid_subsets=7, kid_subset_size=30, verbose=False)
    mean, deviation = kernel_distance_of_subsets(x, y, subsets=7, subset_size=30)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-10)
    with pytest.raises(ValueError, match="60 and 50"):
        kernel_distance_of_subsets(x, y, subset_size=51)


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
    from ssdd.fidelity import kid, neighbours

    x, y, z = normal(50, 6), normal(40, 6, seed=1), normal(30, 6, seed=2)

    def everything():
        estimate = kernel_bootstrap({"x": x}, y, resamples=5)["x"]
        return [kernel_distance(x, y), *estimate.resampled, *precision_recall(x, y), *copy_rate(x, y, z)]

    whole = everything()
    for module in (neighbours, kid):
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
