from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ssdd.engine.errors import UserError
from ssdd.engine.files import sha256_json
from ssdd.engine.processes import Processes
from ssdd.fidelity import measure as measure_module
from ssdd.fidelity.features import FeatureNetwork, Outputs
from ssdd.fidelity.measure import load_statistics, measure, measure_once, provenance_of
from ssdd.fidelity.set_to_measure import SetToMeasure
from ssdd.fidelity.stored_sets import SplitImages, Treatment, open_set
from ssdd.images.sources import DatasetConfig

ALONE = Processes(0, 1, torch.device("cpu"))


class Means(nn.Module):
    """Channel means as features and logits, the corner's pixel as spatial features."""

    def forward(self, images):
        means = images.double().mean(dim=(2, 3))
        return Outputs(means, means / 50, images[:, :, 0, 0].double())


def means_network(name="inception", checksum="aa"):
    return FeatureNetwork(name, 3, checksum, Means(), classes=3, spatial_dim=3)


def measured_once(images, network, batch_size, cache, **options):
    return measure_once(images, [network], ALONE, cache, batch_size, **options)[network.name]


def read(opened, network):
    return opened.statistics([network], ALONE)[network.name]


def write(folder, n, seed=0):
    folder.mkdir()
    images = np.random.RandomState(seed).randint(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return images


def same(a, b):
    parts = ((a.mean, b.mean), (a.cov, b.cov), (a.features, b.features), (a.spatial.cov, b.spatial.cov))
    return all(torch.equal(x, y) for x, y in parts) and (a.count, a.inception_score) == (b.count, b.inception_score)


def test_a_reference_is_measured_once_for_the_same_images_crop_and_weights(tmp_path, monkeypatch):
    write(tmp_path / "a", 20)
    images, network, cache = open_set(tmp_path / "a"), means_network(), tmp_path / "cache"
    first = measured_once(images, network, 4, cache)
    with monkeypatch.context() as nothing_measured:
        nothing_measured.setattr(measure_module, "measure", None)
        again = measured_once(open_set(tmp_path / "a"), network, 7, cache)
    assert same(first, again)
    assert torch.equal(first.features, measure(images.batches(20), [network], ALONE)["inception"].features)
    measured_once(open_set(tmp_path / "a", im_size=4), network, 4, cache)
    measured_once(images, means_network(checksum="bb"), 4, cache)
    assert len(list(cache.iterdir())) == 3


def test_features_are_kept_of_so_many_images_at_most_and_moments_are_of_all(tmp_path):
    write(tmp_path / "a", 20)
    images, network = open_set(tmp_path / "a"), means_network()
    every = measure(images.batches(4), [network], ALONE)["inception"]
    some = measured_once(images, network, 4, tmp_path / "cache", kept=8)
    assert some.count == 20 and torch.allclose(some.cov, every.cov, rtol=1e-12)
    assert len(some.features) == 8 and all((every.features == row).all(dim=1).any() for row in some.features)
    assert len(measured_once(images, network, 4, tmp_path / "cache", kept=100).features) == 20  # another file


@pytest.mark.parametrize("name", ["cache", "n" * 300], ids=["a file", "a name too long to look for"])
def test_a_cache_that_can_not_be_written_to_is_warned_of_and_costs_nothing_else(tmp_path, caplog, name):
    write(tmp_path / "a", 20)
    (tmp_path / "cache").write_text("a file, not a folder")
    images = open_set(tmp_path / "a")
    assert measured_once(images, means_network(), 4, tmp_path / name).count == 20
    assert "can't store statistics" in caplog.text


def test_a_split_is_a_set_that_is_measured_once_and_its_key_knows_what_is_skipped(tmp_path):
    cfg = DatasetConfig(source="digits", im_size=16, limit=12)
    images, network = SplitImages(cfg, "val"), means_network()
    first = measured_once(images, network, 5, tmp_path)
    assert torch.equal(first.features, images.dataset.pixels(range(12)).double().mean(dim=(2, 3)).float())
    same_images = (SplitImages(cfg, "val"), SplitImages(replace(cfg, workers=1), "val"))
    others = (replace(cfg, limit=11), replace(cfg, crop="adm"), replace(cfg, on_corrupt="skip"))
    assert len({sha256_json(provenance_of(each, [network])) for each in (images, *same_images)}) == 1
    assert len({sha256_json(provenance_of(SplitImages(other, "val"), [network])) for other in (cfg, *others)}) == 4
    assert len(list(tmp_path.iterdir())) == 1


def test_a_statistics_file_stands_for_its_images_and_says_where_it_comes_from(tmp_path):
    write(tmp_path / "a", 20)
    network = means_network()
    images = open_set(tmp_path / "a", im_size=4)
    expected = measured_once(images, network, 4, tmp_path / "cache")
    path = next((tmp_path / "cache").iterdir())
    stored, provenance = load_statistics(path)
    assert same(stored, expected) and provenance == provenance_of(images, [network])["inception"]
    assert provenance | {"fingerprint": ""} == {
        "network": "inception", "dim": 3, "checksum": "aa", "resize": "none",
        "crop": "adm", "size": [4, 4], "count": 20, "kept_features": 20,
        "fingerprint": "",
    }  # fmt: skip
    opened = SetToMeasure(path)
    assert opened.treatment == Treatment("adm", (4, 4)) and opened.count == 20
    assert same(read(opened, network), expected)
    with pytest.raises(UserError, match="weights aa.*weights bb"):
        read(opened, means_network(checksum="bb"))
    with pytest.raises(UserError, match="not with other"):
        read(opened, means_network("other"))


def test_adms_reference_gives_its_moments_and_the_features_of_its_images(tmp_path):
    images = write(tmp_path / "a", 12)
    draw = np.random.RandomState(0)
    moments = {"mu": draw.randn(3), "mu_s": draw.randn(3), "sigma": np.eye(3) * 2, "sigma_s": np.eye(3) * 3}
    np.savez(tmp_path / "adm.npz", arr_0=images, **moments)
    opened = SetToMeasure(tmp_path / "adm.npz")
    statistics = read(opened, means_network())
    assert statistics.count is None and opened.treatment == Treatment("unknown", (8, 8))
    assert np.array_equal(statistics.mean, moments["mu"]) and np.array_equal(statistics.spatial.cov, moments["sigma_s"])
    expected = measure(open_set(tmp_path / "a").batches(5), [means_network()], ALONE)["inception"].features
    assert torch.allclose(statistics.features, expected)
    with pytest.raises(UserError, match="measured with inception"):
        read(opened, means_network("efficientnet_lite0"))


def test_torch_fidelitys_statistics_are_read_without_running_code(tmp_path):
    mu, sigma = np.arange(3, dtype=np.float32), np.eye(3)
    path = tmp_path / "set-inception-v3-compat-stat-fid-2048.pt"
    torch.save({"mu": mu, "sigma": sigma}, path)
    statistics = read(SetToMeasure(path), means_network())
    assert statistics.mean.tolist() == [0, 1, 2] and torch.equal(statistics.cov, torch.eye(3).double())

    class Malicious:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"mu": mu, "sigma": Malicious()}, path)
    with pytest.raises(UserError, match="not a statistics file"):
        SetToMeasure(path)


def test_broken_statistics_are_errors(tmp_path):
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "nan.npz", mu=np.array([0, np.nan]), sigma=np.eye(2))
    np.savez(tmp_path / "objects.npz", mu=np.array([None]), sigma=np.eye(1))
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    for name in ("shapes.npz", "nan.npz", "objects.npz", "no.safetensors"):
        with pytest.raises(UserError, match=name):
            SetToMeasure(tmp_path / name)
