"""LPIPS on weights laid down in the search path equals the lpips package; Lite0 distance of equal images is zero."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
import torchvision
from lpips import LPIPS

from ssdd.engine import weights
from ssdd.engine.errors import UserError
from ssdd.engine.pictures import from_uint8
from ssdd.perceptual import FeatureDistance, Lpips


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
