"""Statistics of features: float64, the same for any batches, order and processes, each image once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ssdd.engine.processes import Processes
from ssdd.fidelity.inception_score import InceptionScore, shuffled_splits
from ssdd.fidelity.moments import FeatureStatistics, SeenIndices, Statistics
from tests.fidelity.normal_features import normal, statistics_of

REPOSITORY = Path(__file__).parents[2]
ALONE = Processes(0, 1, torch.device("cpu"))


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


def test_indices_are_new_once_whatever_their_order_and_however_far_apart():
    seen = SeenIndices()
    assert seen.add(torch.tensor([7, 3, 7])).tolist() == [1, 0]
    assert seen.add(torch.tensor([3, 9000, 0, 7])).tolist() == [2, 1]
    assert len(seen.add(torch.tensor([], dtype=torch.int64))) == 0
    assert seen.all().tolist() == [3, 7, 0, 9000] and not seen.has_doubles()


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
    collected.reduce(ALONE)
    collected.update(normal(2, 3, seed=1), torch.tensor([4, 5]))
    assert collected.compute().count == 6


def agrees(found, expected, tolerance=1e-10):
    """Whether two statistics are equal to `tolerance` of their largest numbers."""
    pairs = ((found.mean, expected.mean), (found.cov, expected.cov))
    return found.count == expected.count and all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in pairs)


@pytest.mark.parametrize("keep_features", [True, False])
def test_statistics_are_the_same_for_any_batch_size_also_where_means_are_large(keep_features):
    features = normal(131, 6) * torch.arange(1, 7) + 1000
    exact = features.double()
    expected = Statistics(131, exact.mean(dim=0), torch.cov(exact.T))
    for batch_size in (1, 7, 64):
        assert agrees(statistics_of(features, batch_size, keep_features), expected)


PROCESSES = """
import json, sys
import torch
from torch import distributed
from ssdd.engine.processes import Processes
from ssdd.fidelity.moments import FeatureStatistics
from ssdd.fidelity.inception_score import InceptionScore, shuffled_splits

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
processes = Processes(rank, world, torch.device("cpu"))
features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)) + 100

def collect(keep_features, own):
    collected = FeatureStatistics(3, keep_features)
    score = InceptionScore(3, shuffled_splits(7, 2))
    for indices in torch.tensor(own, dtype=torch.int64).split(2):
        collected.update(features[indices], indices)
        score.update(features[indices], indices)
    collected.reduce(processes)
    score.reduce(processes)
    statistics = collected.compute()
    return [statistics.count, statistics.mean.tolist(), statistics.cov.tolist(), score.compute()]

own = list(range(rank, 7, world))
outcome = {"features": collect(True, own), "moments": collect(False, own)}
idle = list(range(7)) if rank == 0 else []  # only the first process has images
outcome |= {"features, idle": collect(True, idle), "moments, idle": collect(False, idle)}
padded = own + [0] * (rank > 0)  # an image repeated by a process that has fewer
try:
    collect(False, padded)
except ValueError as problem:
    outcome["padded moments"] = str(problem)
collected = FeatureStatistics(3)
collected.update(features[padded], torch.tensor(padded))
collected.reduce(processes)
outcome["padded features"] = collected.compute().count
print(json.dumps(outcome))
distributed.destroy_process_group()
"""


def test_two_processes_together_see_what_one_sees(tmp_path):
    world = 2
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, str(rank), str(world), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    features = normal(7, 3) + 100
    whole = statistics_of(features)
    score = InceptionScore(3, shuffled_splits(7, 2))
    score.update(features, torch.arange(7))
    for outcome in [json.loads(process.communicate(timeout=120)[0]) for process in processes]:
        assert "two processes have the same image" in outcome.pop("padded moments")
        assert outcome.pop("padded features") == 7
        for name, (count, mean, cov, inception_score) in outcome.items():
            found = Statistics(count, *(torch.tensor(part, dtype=torch.float64) for part in (mean, cov)))
            assert agrees(found, whole, 0 if name.startswith("features") else 1e-10), name
            assert inception_score == pytest.approx(score.compute(), rel=1e-10)
