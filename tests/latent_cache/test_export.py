"""Exports have the layouts of their peers, and are complete or absent."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torchvision.datasets import DatasetFolder

from latent_cache import LatentDataset
from latent_cache.__main__ import main
from latent_cache.peers.export import ExportConfig, export
from latent_cache.peers.formats import FORMATS
from latent_cache.peers.mar import class_folders
from ssdd.engine.errors import UserError
from tests.kills import files
from tests.latent_cache.synthetic import raw


def test_fast_dit_gets_normalised_latents_and_labels_by_number(mean_cache, tmp_path):
    export(ExportConfig(str(mean_cache), "fast-dit", str(tmp_path / "out")))
    cache = LatentDataset(mean_cache)
    latents, labels = cache.gather(range(50))
    for i in (0, 17, 49):
        feature = np.load(tmp_path / f"out/imagenet256_features/{i}.npy")
        label = np.load(tmp_path / f"out/imagenet256_labels/{i}.npy")
        assert feature.shape == (1, 3, 4, 4) and feature.dtype == np.float32 and label.shape == (1,)
        assert np.array_equal(feature[0], latents[i]) and label[0] == labels[i]
    assert len(list((tmp_path / "out/imagenet256_features").iterdir())) == 50


def test_samples_for_fast_dit_have_unit_variance_and_belong_to_the_seed_alone(posterior_cache, tmp_path):
    export(ExportConfig(str(posterior_cache), "fast-dit", str(tmp_path / "a")))
    export(ExportConfig(str(posterior_cache), "fast-dit", str(tmp_path / "b"), seed=1))
    a, b = (np.stack([np.load(tmp_path / f"{name}/imagenet256_features/{i}.npy") for i in range(50)]) for name in "ab")
    assert np.allclose(a.std((0, 1, 3, 4)), 1, atol=0.1) and np.allclose(a.mean((0, 1, 3, 4)), 0, atol=0.15)
    assert not np.allclose(a, b)


def test_lightningdit_gets_raw_latents_of_both_views_and_its_statistics(mean_cache, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "lightningdit", replace(FORMATS["lightningdit"], block=20))
    export(ExportConfig(str(mean_cache), "lightningdit", str(tmp_path / "out")))
    names = [f"latents_rank00_shard{number:03d}.safetensors" for number in range(3)]
    assert sorted(os.listdir(tmp_path / "out")) == ["export.json", *names, "latents_stats.pt"]
    parts = [load_file(tmp_path / "out" / name) for name in names]
    assert [len(part["labels"]) for part in parts] == [20, 20, 10]
    assert parts[0]["latents"].dtype == np.float32 and parts[0]["labels"].dtype == np.int64
    for key, view in (("latents", 0), ("latents_flip", 1)):
        expected, _, labels = raw(mean_cache, view)
        assert np.array_equal(np.concatenate([part[key] for part in parts]), expected)
        assert np.array_equal(np.concatenate([part["labels"] for part in parts]), labels)
    statistics = torch.load(tmp_path / "out/latents_stats.pt", weights_only=True)
    assert statistics["mean"].shape == statistics["std"].shape == (1, 3, 1, 1)
    as_its_loader = (torch.from_numpy(parts[0]["latents"]) - statistics["mean"]) / statistics["std"]
    assert torch.allclose(as_its_loader, LatentDataset(mean_cache).gather(range(20))[0], atol=1e-5)


def test_repa_gets_means_and_deviations_and_a_list_of_labels(posterior_cache, tmp_path):
    export(ExportConfig(str(posterior_cache), "repa", str(tmp_path / "out")))
    entries = json.loads((tmp_path / "out/dataset.json").read_text())["labels"]
    means, logvars, labels = raw(posterior_cache)
    assert entries[7] == ["00000/img-mean-std-00000007.npy", int(labels[7])] and len(entries) == 50
    rows = np.stack([np.load(tmp_path / "out" / name) for name, _ in entries])
    assert rows.dtype == np.float32 and rows.shape == (50, 6, 4, 4)
    assert np.array_equal(rows[:, :3], means)
    assert np.allclose(rows[:, 3:], np.exp(0.5 * logvars.numpy()), rtol=1e-5)


def test_repa_of_means_has_deviation_0_and_says_so(mean_cache, tmp_path, caplog):
    export(ExportConfig(str(mean_cache), "repa", str(tmp_path / "out")))
    row = np.load(tmp_path / "out/00000/img-mean-std-00000003.npy")
    assert np.array_equal(row[:3], raw(mean_cache)[0][3]) and not row[3:].any()
    assert "content=moments" in caplog.text


def test_code_that_multiplies_with_a_literal_sees_unit_variance(posterior_cache, tmp_path):
    export(ExportConfig(str(posterior_cache), "repa", str(tmp_path / "out"), scaling_factor=0.18215))
    rows = np.stack([np.load(path) for path in sorted((tmp_path / "out/00000").iterdir())]) * 0.18215
    assert np.allclose(rows[:, :3].var((0, 2, 3)) + (rows[:, 3:] ** 2).mean((0, 2, 3)), 1, atol=0.1)
    with pytest.raises(UserError, match="for format=repa and format=mar only"):
        export(ExportConfig(str(posterior_cache), "fast-dit", str(tmp_path / "no"), scaling_factor=0.2))


def test_mar_gets_moments_of_both_views_in_a_folder_a_class(posterior_cache, tmp_path):
    export(ExportConfig(str(posterior_cache), "mar", str(tmp_path / "out")))
    labels = raw(posterior_cache)[2]
    assert labels[13] == 3
    found = np.load(tmp_path / "out/class 3/000000013.npz", allow_pickle=False)
    for key, view in (("moments", 0), ("moments_flip", 1)):
        means, logvars, _ = raw(posterior_cache, view)
        assert np.allclose(found[key], np.concatenate([means[13], logvars[13]]), atol=1e-6)
    tree = DatasetFolder(tmp_path / "out", loader=np.load, extensions=(".npz",))  # as MAR reads it
    numbers = [int(Path(path).stem) for path, _ in tree.samples]
    assert sorted(numbers) == list(range(50)) and tree.targets == labels[numbers].tolist()


def test_folders_of_classes_that_do_not_sort_are_numbered():
    assert class_folders(["n01", "n02"]) == ["n01", "n02"]
    assert class_folders([str(label) for label in range(11)])[10] == "0010"
    assert class_folders(["a/b", "c"]) == class_folders(["b", "a"]) == class_folders(["a", "a"]) == ["0000", "0001"]


@pytest.mark.parametrize("layout", [name for name, peer in FORMATS.items() if peer.both_views])
def test_mirrored_views_that_are_missing_are_asked_for(means, tmp_path, layout):
    with pytest.raises(UserError, match=r"views\.flip=true, or pass flips=repeat"):
        export(ExportConfig(str(means), layout, str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())
    export(ExportConfig(str(means), layout, str(tmp_path / "out"), flips="repeat"))
    if layout == "lightningdit":
        (part,) = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
        assert np.array_equal(part["latents"], part["latents_flip"])


@pytest.mark.parametrize("layout", FORMATS)
def test_a_dry_run_says_how_many_and_how_large_and_writes_nothing(posterior_cache, tmp_path, layout, capsys):
    arguments = ["export", f"cache={posterior_cache}", f"format={layout}", f"out={tmp_path / 'out'}"]
    assert main([*arguments, "dry_run=true"]) == 0
    told = capsys.readouterr().out
    assert "50 latents of train" in told and not list(tmp_path.iterdir())
    assert main(arguments) == 0
    names = ("export.json", "dataset.json", "latents_stats.pt")
    found = sum(len(data) for name, data in files(tmp_path / "out").items() if name not in names)
    assert found == pytest.approx(int(told.split(" bytes")[0].split()[-1]), abs=400 if layout == "lightningdit" else 0)


@pytest.mark.parametrize("layout", FORMATS)
def test_an_interrupted_export_goes_on_and_ends_with_the_same_bytes(posterior_cache, tmp_path, layout, monkeypatch):
    peer = replace(FORMATS[layout], block=16)
    monkeypatch.setitem(FORMATS, layout, peer)
    export(ExportConfig(str(posterior_cache), layout, str(tmp_path / "straight")))
    calls = []

    def write_twice(*given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(given)
        peer.write(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(FORMATS, layout, replace(peer, write=write_twice))
        export(ExportConfig(str(posterior_cache), layout, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"out\.partial is not an unfinished export of the same"):
        export(ExportConfig(str(posterior_cache), layout, str(tmp_path / "out"), seed=1))
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, layout, replace(peer, write=lambda *given: (calls.append(given), peer.write(*given))))
        export(ExportConfig(str(posterior_cache), layout, str(tmp_path / "out")))
        export(ExportConfig(str(posterior_cache), layout, str(tmp_path / "out")))  # finished: at once
    assert len(calls) == 4
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["out", "straight"]


def test_a_folder_in_the_way_is_left_alone(mean_cache, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists and is not this export"):
        export(ExportConfig(str(mean_cache), "repa", str(tmp_path)))
    assert os.listdir(tmp_path) == ["mine"]
