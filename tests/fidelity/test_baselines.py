"""Trivial baselines in closed cases, and the grammar of rows to compare."""

from __future__ import annotations

import pytest
import torch

from ssdd.engine.errors import UserError
from ssdd.fidelity.baselines import PixelPCA, classwise_gaussian_samples, slight_blur
from ssdd.model.compared_decoders import open_rows


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_pca_with_every_component_returns_the_training_images_and_with_none_too_many_their_mean():
    training = images(20)
    full, one = PixelPCA(training, 20), PixelPCA(training, 1)
    assert torch.equal(full.decode(full.encode(training)), training)
    errors = [(pca.decode(pca.encode(training)).float() - training.float()).square().mean() for pca in (one, full)]
    assert errors[0] > errors[1]


def test_pca_of_more_images_than_numbers_a_picture_is_that_of_the_full_decomposition():
    training = images(400)
    by_covariance = PixelPCA(training, 7)
    of_few = PixelPCA(training[:40], 7)
    centred = training.flatten(1).double() - training.flatten(1).double().mean(dim=0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:7]
    for pca in (by_covariance, of_few):
        assert pca.pca.components_.shape == (7, 48)
    found = torch.from_numpy(by_covariance.pca.components_)
    assert torch.allclose((found @ axes.T).abs(), torch.eye(7).double(), atol=1e-9)
    assert torch.allclose(torch.from_numpy(by_covariance.encode(training)), centred @ found.T, atol=1e-9)


def test_gaussian_samples_have_the_moments_of_their_class():
    dark, light = images(200) // 4, images(200, seed=1) // 4 + 180
    training, labels = torch.cat([dark, light]), torch.arange(400) // 200
    wanted = torch.tensor([0, 1]).repeat(300)
    pca = PixelPCA(training, 48)
    samples = classwise_gaussian_samples(pca, training, labels, wanted, seed=0).float()
    for label, real in enumerate((dark, light)):
        own = samples[wanted == label]
        assert own.mean().item() == pytest.approx(real.float().mean().item(), abs=1)
        assert own.std().item() == pytest.approx(real.float().std().item(), rel=0.1)
    assert torch.equal(samples, classwise_gaussian_samples(pca, training, labels, wanted, seed=0).float())


def test_a_class_of_one_image_is_sampled_as_that_image():
    training = images(20)
    labels = torch.tensor([0] * 19 + [1])
    samples = classwise_gaussian_samples(PixelPCA(training, 20), training, labels, torch.tensor([1, 1]), seed=0)
    assert torch.equal(samples, training[-1:].expand(2, -1, -1, -1))


def test_the_blur_keeps_constants_and_spreads_a_point_by_its_kernel():
    constant = torch.full((1, 3, 5, 5), 77, dtype=torch.uint8)
    assert torch.equal(slight_blur(constant), constant)
    point = torch.zeros(1, 3, 5, 5, dtype=torch.uint8)
    point[..., 2, 2] = 160
    expected = torch.tensor([[10, 20, 10], [20, 40, 20], [10, 20, 10]], dtype=torch.uint8)
    assert torch.equal(slight_blur(point)[0, 0, 1:4, 1:4], expected)


def test_rows_are_parsed_loaded_once_and_refused_when_malformed(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    rows = open_rows([f"a:{tmp_path}:8", f"b:{tmp_path}:1"], tmp_path, torch.device("cpu"))
    assert [(row.name, row.steps) for row in rows] == [("a", 8), ("b", 1)]
    assert rows[0].tokenizer is rows[1].tokenizer
    for wrong in (["a"], ["a:b"], ["a:b:0"], ["a:b:x"], [":b:1"]):
        with pytest.raises(UserError, match="name:checkpoint reference:steps"):
            open_rows(wrong, tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match="two decoders are called 'a'"):
        open_rows([f"a:{tmp_path}:8", f"a:{tmp_path}:1"], tmp_path, torch.device("cpu"))
