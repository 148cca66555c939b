"""Our figures beside those of torch_fidelity.calculate_metrics, on the same two folders of images and weights.

Inception at its own 299 px takes 0.3 s an image on a CPU core. The class attribute that torch-fidelity keeps the size
in is set to 75 px, the least that the network takes, for both sides: the same module, weights and arithmetic, and more
images a set than its 2048 features. That both agree at 299 px in every bit is a test of test_features.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssdd.engine import pretrained as weights
from ssdd.fidelity import features as features_module
from ssdd.fidelity.features import load_features
from ssdd.fidelity.frechet import frechet_distance
from ssdd.fidelity.inception_score import InceptionScore, shuffled_splits
from ssdd.fidelity.kid import kernel_distance, kernel_distance_of_subsets
from ssdd.fidelity.moments import FeatureStatistics
from ssdd.fidelity.neighbours import precision, recall
from ssdd.fidelity.stored_sets import open_set
from tests.fidelity.inception import write_random_inception

SIDE = 32
SMALL = 75
SUBSETS = 25  # of KID; 100, torch-fidelity's default, repeat the same arithmetic


def digit_images(count: int, seed: int, blur: float = 0.0, paper: int = 256) -> Tensor:
    """uint8 [count, 3, 32, 32]: digits of scikit-learn turned, moved and coloured at random, no two alike.

    blur: radius in px; paper: the background's colours are below this.
    """
    from PIL import ImageFilter
    from sklearn.datasets import load_digits

    draw = np.random.RandomState(seed)
    digits = (load_digits().images * (255 / 16)).astype(np.uint8)
    images = []
    for index in draw.randint(len(digits), size=count):
        image = Image.fromarray(digits[index]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        moved = tuple(draw.randint(-4, 5, size=2).tolist())
        image = image.rotate(draw.uniform(-25, 25), Image.Resampling.BILINEAR, translate=moved)
        image = image.filter(ImageFilter.GaussianBlur(blur)) if blur else image
        front, back = draw.randint(256, size=(3, 1, 1)), draw.randint(paper, size=(3, 1, 1))
        shade = np.asarray(image) / 255
        images.append(
            (shade * front + (1 - shade) * back + draw.randn(3, SIDE, SIDE) * 6).clip(0, 255).astype(np.uint8)
        )
    return torch.from_numpy(np.stack(images))


def write_folder(folder: Path, images: Tensor) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture
def small_inception(tmp_path, monkeypatch):
    """The weights file of an Inception that takes 75 px, also found by `load_features`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", SMALL)
    monkeypatch.setattr(features_module, "SPATIAL_SIDE", 3)
    monkeypatch.setitem(weights.PRETRAINED, "inception", replace(weights.PRETRAINED["inception"], sha256=""))
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    path = tmp_path / weights.PRETRAINED["inception"].filename
    write_random_inception(path, digit_images(64, seed=9))
    return path


@pytest.fixture
def registered_lite0():
    """The name under which torch-fidelity knows our EfficientNet-Lite0."""
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Lite0(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.network = load_features("efficientnet_lite0")

        @staticmethod
        def get_provided_features_list():
            return "1280", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "1280"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            found = self.network.outputs(images)
            return tuple({"1280": found.features, "logits": found.logits}[name] for name in self.features_list)

    name = "efficientnet-lite0"
    register_feature_extractor(name, Lite0)
    yield name
    del FEATURE_EXTRACTORS_REGISTRY[name]


def theirs(a: Path, b: Path, extractor: str, subset_size: int, **options) -> dict[str, float]:
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=str(a), input2=str(b), feature_extractor=extractor, fid=True, kid=True, isc=True, prc=True,
        kid_subsets=SUBSETS, kid_subset_size=subset_size, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
        **options,
    )  # fmt: skip
    names = {
        "frechet": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "kid_deviation": "kernel_inception_distance_std",
        "inception_score": "inception_score_mean",
        "inception_score_deviation": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
    }
    return {ours: found[name] for ours, name in names.items()}


def ours(a: Path, b: Path, network_name: str, subset_size: int) -> tuple[dict[str, float], float]:
    """The same metrics by our modules, with torch-fidelity's shuffles and subsets; and KID over all pairs."""
    network = load_features(network_name)
    images = open_set(str(a))
    score = InceptionScore(network.classes, shuffled_splits(len(images)))
    collected = []
    for image_set in (images, open_set(str(b))):
        collected.append(FeatureStatistics(network.dim))
        for pixels, indices in image_set.batches(64):
            found = network.outputs(pixels)
            collected[-1].update(found.features, indices)
            if image_set is images:
                score.update(found.logits, indices)
    x, y = (own.compute() for own in collected)
    kid, kid_deviation = kernel_distance_of_subsets(x.features, y.features, SUBSETS, subset_size)
    inception_score, inception_score_deviation = score.compute()
    return {
        "frechet": frechet_distance(x, y),
        "kid": kid,
        "kid_deviation": kid_deviation,
        "inception_score": inception_score,
        "inception_score_deviation": inception_score_deviation,
        "precision": precision(y.features, x.features),
        "recall": recall(y.features, x.features),
    }, kernel_distance(x.features, y.features)


@pytest.mark.slow
def test_every_metric_is_torch_fidelitys_on_more_images_than_features(tmp_path, small_inception, registered_lite0):
    a = write_folder(tmp_path / "a", digit_images(2060, seed=0, blur=1, paper=160))
    b = write_folder(tmp_path / "b", digit_images(2055, seed=1))
    for extractor, network, options in (
        ("inception-v3-compat", "inception", {"feature_extractor_weights_path": str(small_inception)}),
        (registered_lite0, "efficientnet_lite0", {}),
    ):
        expected = theirs(a, b, extractor, subset_size=1000, **options)
        found, over_all_pairs = ours(a, b, network, subset_size=1000)
        assert found == pytest.approx(expected, rel=1e-4), extractor
        assert 0.05 < found["precision"] < 1 and 0.05 < found["recall"] < 1 and found["inception_score"] > 1.02
        # Both KIDs estimate the same number: they differ by what drawing the subsets leaves to chance.
        assert abs(over_all_pairs - found["kid"]) < 4 * found["kid_deviation"] / SUBSETS**0.5


def test_every_metric_is_torch_fidelitys_on_few_images(tmp_path, registered_lite0):
    a = write_folder(tmp_path / "a", digit_images(60, seed=0, blur=1, paper=160))
    b = write_folder(tmp_path / "b", digit_images(50, seed=1))
    expected = theirs(a, b, registered_lite0, subset_size=20)
    with pytest.warns(UserWarning, match="mostly bias"):
        found, _ = ours(a, b, "efficientnet_lite0", subset_size=20)
    assert found == pytest.approx(expected, rel=1e-4)
