"""LPIPS on weights laid down in the search path equals the lpips package; Lite0 distance of equal images is zero."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
from lpips import LPIPS
from PIL import Image

from ssdd.engine import pretrained as weights
from ssdd.engine.errors import UserError
from ssdd.images.pixels import from_uint8
from ssdd.losses.perceptual import (
    DREAMSIM_HUB_FILES,
    DreamSim,
    FeatureDistance,
    Lpips,
    automatic_without_weights,
    load_metrics,
)


def test_lpips_equals_the_package_on_the_same_weights(tmp_path, monkeypatch):
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16()
    path = tmp_path / weights.PRETRAINED["vgg16"].filename
    torch.save({key: value for key, value in vgg.state_dict().items() if key.startswith("features.")}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.PRETRAINED, "vgg16", replace(weights.PRETRAINED["vgg16"], sha256=digest))
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))

    ours = Lpips("vgg")
    theirs = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    for key, value in theirs.net.state_dict().items():
        value.copy_(vgg.state_dict()[f"features.{key.split('.', 1)[1]}"])
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.allclose(ours(a, b), theirs(a, b).flatten(), rtol=1e-4)
    a.requires_grad_(True)
    ours(a, a.detach()).sum().backward()
    assert a.grad.isfinite().all() and not any(p.requires_grad for p in ours.parameters())


def test_missing_weights_are_named_with_the_command_that_fetches_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="vgg16-397923af.pth") as error:
        Lpips("vgg")
    assert "curl" in str(error.value) and str(tmp_path) in str(error.value)


def test_the_distance_on_lite0_is_zero_for_equal_images_and_grows_with_noise():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images // 8 + 100
    noise = torch.randint(0, 40, images.shape, generator=torch.Generator().manual_seed(1))
    distance = FeatureDistance()
    variants = ((images + share).to(torch.uint8) for share in (0, noise // 8, noise))
    same, little, more = (distance(from_uint8(variant), from_uint8(images)) for variant in variants)
    assert same.abs().max() < 1e-6 and (little < more).all() and (little > 0).all() and (more <= 2).all()


@pytest.fixture
def alexnet(tmp_path, monkeypatch):
    """A random AlexNet as the only download of this machine; its tensors."""
    torch.manual_seed(0)
    tensors = torchvision.models.alexnet().state_dict()
    path = tmp_path / weights.PRETRAINED["alexnet"].filename
    torch.save({key: value for key, value in tensors.items() if key.startswith("features.")}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.PRETRAINED, "alexnet", replace(weights.PRETRAINED["alexnet"], sha256=digest))
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tensors


@pytest.mark.parametrize(("height", "width", "padded"), [(64, 64, (64, 64)), (48, 40, (64, 64)), (16, 65, (32, 128))])
def test_lpips_as_a_metric_is_alexnets_on_images_filled_up_to_a_power_of_two(alexnet, height, width, padded):
    theirs = LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    for key, value in theirs.net.state_dict().items():
        value.copy_(alexnet[f"features.{key.split('.', 1)[1]}"])
    a, b = torch.rand(2, 3, height, width) * 2 - 1, torch.rand(2, 3, height, width) * 2 - 1
    margins = ((0, 0), (0, 0), (0, padded[0] - height), (0, padded[1] - width))
    filled = [torch.from_numpy(np.pad(x.numpy(), margins)) for x in (a, b)]
    assert filled[0].shape[2:] == padded
    ours = load_metrics(["LPIPS"], "cpu")["LPIPS"]
    assert torch.allclose(ours(a, b), theirs(*filled).flatten(), rtol=1e-4)


def fake_dreamsim(tmp_path, monkeypatch):
    """The package's call, on a network whose distance is the mean absolute difference; returns its arguments."""
    calls = []

    class Network(torch.nn.Module):
        def forward(self, a, b):
            for x in (a, b):
                assert x.shape[1:] == (3, 224, 224) and x.min() >= 0 and x.max() <= 1
            return (a - b).abs().mean(dim=(1, 2, 3))

    def dreamsim(**arguments):
        calls.append(arguments)
        torch.rand(1)
        return Network(), None

    module = ModuleType("dreamsim")
    module.__spec__, module.dreamsim = ModuleSpec("dreamsim", None), dreamsim
    monkeypatch.setitem(sys.modules, "dreamsim", module)
    for member in weights.PRETRAINED["dreamsim"].members:
        (tmp_path / "dreamsim_ensemble" / member).mkdir(parents=True)
    for name in DREAMSIM_HUB_FILES:
        path = tmp_path / "dreamsim_ensemble" / name
        path.parent.mkdir()
        path.touch()
    return calls


def test_dreamsim_is_not_opened_where_its_package_would_download_code_and_run_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    calls = fake_dreamsim(tmp_path, monkeypatch)
    (tmp_path / "dreamsim_ensemble/facebookresearch_dino_main/hubconf.py").unlink()
    assert "DreamSim" in automatic_without_weights(["auto"]) and "DreamSim" not in load_metrics(["auto"], "cpu")
    with pytest.raises(UserError, match=r"dreamsim_ensemble lacks facebookresearch_dino_main/hubconf\.py, .* fetches"):
        load_metrics(["DreamSim"], "cpu")
    assert not calls


def test_dreamsim_calls_the_package_on_images_as_the_package_prepares_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path))
    calls = fake_dreamsim(tmp_path, monkeypatch)
    state = torch.get_rng_state()
    metric = load_metrics(["DreamSim"], "cpu")["DreamSim"]
    assert torch.equal(state, torch.get_rng_state())  # making the network draws nothing of the program's
    assert calls == [{"pretrained": True, "device": "cpu", "cache_dir": str(tmp_path / "dreamsim_ensemble")}]

    images = np.random.RandomState(0).randint(0, 256, (2, 3, 100, 80)).astype(np.uint8)
    prepared = metric.features(from_uint8(torch.from_numpy(images)))
    resize = torchvision.transforms.Resize((224, 224), torchvision.transforms.InterpolationMode.BICUBIC)
    for image, ours in zip(images, prepared, strict=True):
        theirs = np.asarray(resize(Image.fromarray(image.transpose(1, 2, 0)))).transpose(2, 0, 1) / 255
        difference = np.abs(ours.numpy() - theirs)
        assert difference.max() < 1.01 / 255 and difference.mean() < 1e-3 / 255  # Pillow's coefficients are integers
    same = from_uint8(torch.from_numpy(np.random.RandomState(1).randint(0, 256, (2, 3, 224, 224)).astype(np.uint8)))
    expected = (same[0] - same[1]).abs().mean() / 2
    assert metric(same[:1], same[1:]).tolist() == pytest.approx([expected.item()], rel=1e-5)


def test_auto_leaves_out_what_is_missing_and_a_name_is_an_error(alexnet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    assert set(load_metrics(["auto"], "cpu")) == {"LPIPS", "lite0_distance"}
    assert automatic_without_weights(["auto"]) == ["DreamSim"] and automatic_without_weights(["LPIPS"]) == []
    assert load_metrics(["PSNR"], "cpu") == {}
    with pytest.raises(UserError, match="pip install dreamsim"):
        load_metrics(["auto", "DreamSim"], "cpu")
    fake_dreamsim(tmp_path, monkeypatch)
    assert isinstance(load_metrics(["auto"], "cpu")["DreamSim"], DreamSim)
    (tmp_path / "dreamsim_ensemble" / "ensemble_lora").rmdir()
    with pytest.raises(UserError, match="unzip -d dreamsim_ensemble"):
        load_metrics(["DreamSim"], "cpu")


def test_lpips_is_float32_under_autocast(alexnet):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    exact = Lpips("alex")(images, -images)
    with torch.autocast("cpu", torch.bfloat16):
        found = Lpips("alex")(images, -images)
    assert found.dtype == torch.float32 and torch.allclose(found, exact, rtol=0.05)
