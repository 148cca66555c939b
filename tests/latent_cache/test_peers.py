"""Exports have the layouts of their peers, and come back as they went."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torchvision.datasets import DatasetFolder

from latent_cache import LatentDataset
from latent_cache.__main__ import main
from latent_cache.config import ExportConfig, ImportConfig
from latent_cache.peers import export as export_module
from latent_cache.peers import lightningdit
from latent_cache.peers.export import export
from latent_cache.peers.importing import import_latents
from latent_cache.read.stored_rows import stored_rows
from latent_cache.verify import verify
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json
from ssdd.model.latent import LatentNorm
from tests.latent_cache.straight import files
from tests.latent_cache.synthetic import FINGERPRINT, make_cache

REPOSITORY = Path(__file__).resolve().parents[2]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture(scope="module")
def posterior_cache(tmp_path_factory):
    """50 posteriors [2, 3 channels, 4, 4] with both views, far from mean 0 and deviation 1, in shards of 16."""
    means = normal(50, 2, 3, 4, 4) * [[[2.0]], [[0.1]], [[1.0]]] + [[[1.0]], [[-0.2]], [[0.0]]]
    rows = np.concatenate([means, normal(50, 2, 3, 4, 4, seed=1) - 2], 2)
    return make_cache(tmp_path_factory.mktemp("p") / "cache", rows, content="moments", shard=16)


@pytest.fixture(scope="module")
def mean_cache(tmp_path_factory):
    """50 means with both views."""
    rows = normal(50, 2, 3, 4, 4) * [[[2.0]], [[0.1]], [[1.0]]] + [[[1.0]], [[-0.2]], [[0.0]]]
    return make_cache(tmp_path_factory.mktemp("m") / "cache", rows, shard=16)


def values(cache, view=0):
    """Stored values of a view, float32 [n, K, h, w], and labels."""
    parts = list(stored_rows(cache, np.arange(len(cache)), chunk=16))
    rows = torch.from_numpy(np.concatenate([part.values[:, view] for part in parts])).float()
    return rows, np.concatenate([part.labels for part in parts])


def stored(folder, view=0):
    """(means, logvars or None, labels) of a cache, raw, float32."""
    cache = LatentDataset(folder)
    rows, labels = values(cache, view)
    channels = cache.latent_shape[0]
    logvars = rows[:, channels:] + 2 * cache.norm.std.log().view(-1, 1, 1) if cache.has_moments else None
    return cache.norm.denormalise(rows[:, :channels]).numpy(), logvars, labels


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
    monkeypatch.setattr(lightningdit, "BLOCK", 20)
    export(ExportConfig(str(mean_cache), "lightningdit", str(tmp_path / "out")))
    names = [f"latents_rank00_shard{number:03d}.safetensors" for number in range(3)]
    assert sorted(os.listdir(tmp_path / "out")) == ["export.json", *names, "latents_stats.pt"]
    parts = [load_file(tmp_path / "out" / name) for name in names]
    assert [len(part["labels"]) for part in parts] == [20, 20, 10]
    assert parts[0]["latents"].dtype == np.float32 and parts[0]["labels"].dtype == np.int64
    for key, view in (("latents", 0), ("latents_flip", 1)):
        expected, _, labels = stored(mean_cache, view)
        assert np.array_equal(np.concatenate([part[key] for part in parts]), expected)
        assert np.array_equal(np.concatenate([part["labels"] for part in parts]), labels)
    statistics = torch.load(tmp_path / "out/latents_stats.pt", weights_only=True)
    assert statistics["mean"].shape == statistics["std"].shape == (1, 3, 1, 1)
    as_its_loader = (torch.from_numpy(parts[0]["latents"]) - statistics["mean"]) / statistics["std"]
    assert torch.allclose(as_its_loader, LatentDataset(mean_cache).gather(range(20))[0], atol=1e-5)


def test_repa_gets_means_and_deviations_and_a_list_of_labels(posterior_cache, tmp_path):
    export(ExportConfig(str(posterior_cache), "repa", str(tmp_path / "out")))
    entries = json.loads((tmp_path / "out/dataset.json").read_text())["labels"]
    means, logvars, labels = stored(posterior_cache)
    assert entries[7] == ["00000/img-mean-std-00000007.npy", int(labels[7])] and len(entries) == 50
    rows = np.stack([np.load(tmp_path / "out" / name) for name, _ in entries])
    assert rows.dtype == np.float32 and rows.shape == (50, 6, 4, 4)
    assert np.array_equal(rows[:, :3], means)
    assert np.allclose(rows[:, 3:], np.exp(0.5 * logvars.numpy()), rtol=1e-5)


def test_repa_of_means_has_deviation_0_and_says_so(mean_cache, tmp_path, caplog):
    export(ExportConfig(str(mean_cache), "repa", str(tmp_path / "out")))
    row = np.load(tmp_path / "out/00000/img-mean-std-00000003.npy")
    assert np.array_equal(row[:3], stored(mean_cache)[0][3]) and not row[3:].any()
    assert "content=moments" in caplog.text


def test_code_that_multiplies_with_a_literal_sees_unit_variance(posterior_cache, tmp_path):
    export(ExportConfig(str(posterior_cache), "repa", str(tmp_path / "out"), scaling_factor=0.18215))
    rows = np.stack([np.load(path) for path in sorted((tmp_path / "out/00000").iterdir())]) * 0.18215
    assert np.allclose(rows[:, :3].var((0, 2, 3)) + (rows[:, 3:] ** 2).mean((0, 2, 3)), 1, atol=0.1)
    with pytest.raises(UserError, match="for format=repa and format=mar only"):
        export(ExportConfig(str(posterior_cache), "fast-dit", str(tmp_path / "no"), scaling_factor=0.2))


def test_mar_gets_moments_of_both_views_in_a_folder_a_class(posterior_cache, tmp_path):
    export(ExportConfig(str(posterior_cache), "mar", str(tmp_path / "out")))
    labels = stored(posterior_cache)[2]
    assert labels[13] == 3
    found = np.load(tmp_path / "out/class 3/000000013.npz", allow_pickle=False)
    for key, view in (("moments", 0), ("moments_flip", 1)):
        means, logvars, _ = stored(posterior_cache, view)
        assert np.allclose(found[key], np.concatenate([means[13], logvars[13]]), atol=1e-6)
    tree = DatasetFolder(tmp_path / "out", loader=np.load, extensions=(".npz",))  # as MAR reads it
    numbers = [int(Path(path).stem) for path, _ in tree.samples]
    assert sorted(numbers) == list(range(50)) and tree.targets == labels[numbers].tolist()


def test_folders_of_classes_that_do_not_sort_are_numbered():
    from latent_cache.peers.mar import class_folders

    assert class_folders(["n01", "n02"]) == ["n01", "n02"]
    assert class_folders([str(label) for label in range(11)])[10] == "0010"
    assert class_folders(["a/b", "c"]) == class_folders(["b", "a"]) == class_folders(["a", "a"]) == ["0000", "0001"]


@pytest.mark.parametrize("layout", ["lightningdit", "mar"])
def test_mirrored_views_that_are_missing_are_asked_for(means, tmp_path, layout):
    with pytest.raises(UserError, match=r"views\.flip=true, or pass flips=repeat"):
        export(ExportConfig(str(means), layout, str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())
    export(ExportConfig(str(means), layout, str(tmp_path / "out"), flips="repeat"))
    if layout == "lightningdit":
        (part,) = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
        assert np.array_equal(part["latents"], part["latents_flip"])


@pytest.mark.parametrize("layout", ["fast-dit", "lightningdit", "repa", "mar"])
def test_a_dry_run_says_how_many_and_how_large_and_writes_nothing(posterior_cache, tmp_path, layout, capsys):
    arguments = ["export", f"cache={posterior_cache}", f"format={layout}", f"out={tmp_path / 'out'}"]
    assert main([*arguments, "dry_run=true"]) == 0
    told = capsys.readouterr().out
    assert "50 latents of train" in told and not list(tmp_path.iterdir())
    assert main(arguments) == 0
    names = ("export.json", "dataset.json", "latents_stats.pt")
    found = sum(len(data) for name, data in files(tmp_path / "out").items() if name not in names)
    assert found == pytest.approx(int(told.split(" bytes")[0].split()[-1]), abs=400 if layout == "lightningdit" else 0)


@pytest.mark.parametrize("layout", ["fast-dit", "lightningdit", "repa", "mar"])
def test_an_interrupted_export_goes_on_and_ends_with_the_same_bytes(posterior_cache, tmp_path, layout, monkeypatch):
    peer = export_module.FORMATS[layout]
    monkeypatch.setattr(peer, "BLOCK", 16)
    export(ExportConfig(str(posterior_cache), layout, str(tmp_path / "straight")))
    write, calls = peer.write, []

    def write_twice(*given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(given)
        write(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(peer, "write", write_twice)
        export(ExportConfig(str(posterior_cache), layout, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"out\.partial is not an unfinished export of the same"):
        export(ExportConfig(str(posterior_cache), layout, str(tmp_path / "out"), seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(peer, "write", lambda *given: (calls.append(given), write(*given)))
        export(ExportConfig(str(posterior_cache), layout, str(tmp_path / "out")))
        export(ExportConfig(str(posterior_cache), layout, str(tmp_path / "out")))  # finished: at once
    assert len(calls) == 4
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["out", "straight"]


@pytest.mark.parametrize("layout", ["fast-dit", "repa"])
def test_an_export_and_an_import_killed_again_and_again_end_with_the_same_bytes(mean_cache, tmp_path, layout):
    there, back = tmp_path / "there", tmp_path / "back"
    export(ExportConfig(str(mean_cache), layout, str(tmp_path / "straight")))
    killed("export", f"cache={mean_cache}", f"format={layout}", f"out={there}")
    assert files(there) == files(tmp_path / "straight")
    import_latents(ImportConfig(layout, str(there), str(tmp_path / "straight_back"), samples_per_shard=5))
    killed("import", f"format={layout}", f"source={there}", f"out={back}", "samples_per_shard=5")
    assert files(back) == files(tmp_path / "straight_back")


def killed(*arguments):
    """Run a command whose processes are killed, more and more of its work later, until one ends."""
    script = [sys.executable, str(Path(__file__).with_name("killed.py")), *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(script, env=environment, check=True, capture_output=True, timeout=120)
    assert int(ended.stdout.split()[-1]) >= 5


def test_a_folder_in_the_way_is_left_alone(mean_cache, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists and is not this export"):
        export(ExportConfig(str(mean_cache), "repa", str(tmp_path)))
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("layout", ["fast-dit", "lightningdit", "repa"])
def test_what_was_exported_comes_back_unchanged(mean_cache, posterior_cache, tmp_path, layout):
    folder = posterior_cache if layout == "repa" else mean_cache
    export(ExportConfig(str(folder), layout, str(tmp_path / "there")))
    import_latents(ImportConfig(layout, str(tmp_path / "there"), str(tmp_path / "back"), samples_per_shard=20))
    before, after = LatentDataset(folder), LatentDataset(tmp_path / "back", verify="full")
    first, again = values(before)[0], values(after)[0]
    if layout == "fast-dit":
        assert torch.equal(first, again)
    else:  # float32 of raw values: nothing larger than the spacing of float32 at the raw mean is lost
        moved = (first - again).abs()
        assert moved[:, :3].max() <= 1e-6 and (moved[:, :3] > 0).float().mean() < 0.01
        assert (moved[:, 3:] <= 2e-3 * first[:, 3:].abs()).all()
    if layout == "lightningdit":
        flips = [values(cache, view=1)[0] for cache in (before, after)]
        assert (flips[0] - flips[1]).abs().max() <= 1e-6
    assert after.manifest["views"] == (before.manifest["views"] if layout == "lightningdit" else ["npy"])
    assert np.array_equal(before.labels, after.labels) and before.class_names == after.class_names
    assert (tmp_path / "back/z_stats.json").read_bytes() == (folder / "z_stats.json").read_bytes()
    for key in ("tokenizer", "dataset", "content"):
        assert before.manifest[key] == after.manifest[key]
    assert verify(tmp_path / "back") == []


def foreign(tmp_path, name="foreign"):
    """60 latents as LightningDiT leaves them: two files, statistics of something else. Returns the latents."""
    folder = tmp_path / name
    folder.mkdir()
    latents = (normal(60, 3, 4, 4) * 3 + 1).astype(np.float32)
    for number, part in enumerate((slice(0, 40), slice(40, 60))):
        views = {"latents": latents[part], "latents_flip": latents[part, ..., ::-1].copy()}
        labels = np.arange(60)[part] % 7
        save_file(views | {"labels": labels}, folder / f"latents_rank{number:02d}_shard000.safetensors")
    torch.save({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, folder / "latents_stats.pt")
    return folder, latents


def test_a_foreign_cache_gets_statistics_of_all_its_latents_whatever_its_own_say(tmp_path):
    folder, latents = foreign(tmp_path)
    import_latents(ImportConfig("lightningdit", str(folder), str(tmp_path / "cache"), samples_per_shard=25))
    stats, raw = read_json(tmp_path / "cache/z_stats.json"), latents.astype(np.float64)
    assert np.allclose(stats["mean"], raw.mean((0, 2, 3)), rtol=1e-6)
    assert np.allclose(stats["std"], raw.std((0, 2, 3)), rtol=1e-6)
    cache = LatentDataset(tmp_path / "cache", verify="full")
    found, labels = cache.gather(range(60))
    assert np.allclose(cache.norm.denormalise(found), latents, atol=1e-2)
    assert labels.tolist() == [index % 7 for index in range(60)] and cache.num_classes == 7
    assert cache.has_flips and list(cache.manifest["splits"]) == ["train"]
    mirrored, _ = cache.gather(range(60), flipped=[True] * 60)
    assert torch.equal(mirrored, found.flip(-1))


def test_the_literal_of_a_foreign_fast_dit_cache_is_taken_out(tmp_path):
    raw = normal(12, 2, 4, 4) * 4 + 2
    for name in ("imagenet256_features", "imagenet256_labels"):
        (tmp_path / "fast" / name).mkdir(parents=True)
    for i in range(12):
        number = 3 * i  # numbers with gaps, in another order than their names
        np.save(tmp_path / f"fast/imagenet256_features/{number}.npy", (raw[i : i + 1] * 0.18215).astype(np.float32))
        np.save(tmp_path / f"fast/imagenet256_labels/{number}.npy", np.array([i % 4]))
    import_latents(ImportConfig("fast-dit", str(tmp_path / "fast"), str(tmp_path / "cache"), classes=5))
    cache = LatentDataset(tmp_path / "cache")
    assert np.allclose(cache.norm.mean, raw.mean((0, 2, 3)), rtol=1e-5) and cache.num_classes == 5
    assert np.allclose(cache.norm.denormalise(cache.gather(range(12))[0]), raw, atol=2e-2)
    assert cache.labels.tolist() == [i % 4 for i in range(12)]
    with pytest.raises(UserError, match="labels 0 to 3: expected labels of 2 classes"):
        import_latents(ImportConfig("fast-dit", str(tmp_path / "fast"), str(tmp_path / "other"), classes=2))


def test_nobody_decodes_latents_of_an_encoder_that_nobody_named(tmp_path, tokenizer, capsys):
    folder, _ = foreign(tmp_path)
    import_latents(ImportConfig("lightningdit", str(folder), str(tmp_path / "cache")))
    cache = LatentDataset(tmp_path / "cache")  # good enough to train on
    assert cache.manifest["tokenizer"]["origin"] == "lightningdit"
    assert cache.manifest["tokenizer"]["fingerprint"] == "unknown"
    assert main(["info", f"cache={tmp_path / 'cache'}"]) == 0
    assert "name unknown, weights unknown" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not record which encoder .* import the cache again with tokenizer="):
        LatentNorm.load(tmp_path / "cache/z_stats.json", FINGERPRINT)
    named = ImportConfig("lightningdit", str(folder), str(tmp_path / "named"), fingerprint=FINGERPRINT)
    import_latents(named)
    assert LatentNorm.load(tmp_path / "named/z_stats.json", FINGERPRINT).fingerprint == FINGERPRINT
    with pytest.raises(UserError, match="2 latent channels, the latents have 3"):
        import_latents(ImportConfig("lightningdit", str(folder), str(tmp_path / "x"), tokenizer=str(tokenizer)))
    with pytest.raises(UserError, match="fingerprint=mine: expected 64 hex digits"):
        import_latents(ImportConfig("lightningdit", str(folder), str(tmp_path / "x"), fingerprint="mine"))


def test_an_import_names_its_tokenizer_by_reference(means, tokenizer, tmp_path):
    export(ExportConfig(str(means), "repa", str(tmp_path / "there")))
    (tmp_path / "there/export.json").unlink()
    import_latents(ImportConfig("repa", str(tmp_path / "there"), str(tmp_path / "back"), tokenizer=str(tokenizer)))
    before, after = (LatentDataset(folder).manifest for folder in (means, tmp_path / "back"))
    assert after["tokenizer"] == before["tokenizer"] | {"origin": "repa"}
    assert after["dataset"]["im_size"] == 16 and after["content"] == "mean"


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_nothing_in_a_foreign_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = foreign(tmp_path)
    for content in (pickle.dumps(Bomb()), pickle.dumps({"mean": Bomb(), "std": 1}), b"", b"PK\x03\x04 broken"):
        (folder / "latents_stats.pt").write_bytes(content)
        with pytest.raises(
            UserError, match=r"latents_stats\.pt is not a file of two tensors.*nothing in it was executed"
        ):
            import_latents(ImportConfig("lightningdit", str(folder), "cache"))
    torch.save({"mean": Bomb(), "std": torch.ones(3)}, folder / "latents_stats.pt")
    with pytest.raises(UserError, match="nothing in it was executed"):
        import_latents(ImportConfig("lightningdit", str(folder), "cache"))
    (tmp_path / "repa").mkdir()
    np.save(tmp_path / "repa/a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    (tmp_path / "repa/dataset.json").write_text('{"labels": [["a.npy", 0]]}')
    with pytest.raises(UserError, match=r"a\.npy can't be read as an array of numbers"):
        import_latents(ImportConfig("repa", "repa", "cache"))
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "cache").exists()


def test_a_path_that_leaves_the_source_is_refused(tmp_path):
    for name in ("../secret.npy", "/etc/secret.npy"):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[name, 0]]}))
        with pytest.raises(UserError, match="which is not below"):
            import_latents(ImportConfig("repa", str(tmp_path), str(tmp_path / "out")))


def lose_label(folder):
    (folder / "imagenet256_labels/3.npy").unlink()


def cut(folder):
    path = folder / "imagenet256_features/3.npy"
    path.write_bytes(path.read_bytes()[:-8])


def reshape(folder):
    np.save(folder / "imagenet256_features/3.npy", np.zeros((1, 3, 2, 2), np.float32))


def poison(folder):
    np.save(folder / "imagenet256_features/3.npy", np.full((1, 3, 4, 4), np.nan, np.float32))


def lose_sample(folder):
    (folder / "imagenet256_features/49.npy").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_label, r"imagenet256_labels/3\.npy can't be read"),
        (cut, r"imagenet256_features/3\.npy can't be read"),
        (reshape, r"3\.npy has shape \(1, 3, 2, 2\), others have \(1, 3, 4, 4\)"),
        (poison, r"3\.npy holds values that are not finite"),
        (lose_sample, r"holds 49 latents, its export\.json records 50"),
        (lambda folder: shutil.rmtree(folder / "imagenet256_features"), "is not a cache of fast-DiT"),
    ],
)
def test_a_damaged_source_is_named(mean_cache, tmp_path, damage, message):
    export(ExportConfig(str(mean_cache), "fast-dit", str(tmp_path / "there")))
    damage(tmp_path / "there")
    with pytest.raises(UserError, match=message):
        import_latents(ImportConfig("fast-dit", str(tmp_path / "there"), str(tmp_path / "back")))


@pytest.mark.parametrize("layout", ["lightningdit", "repa", "fast-dit"])
def test_another_format_is_told_from_its_files(tmp_path, layout):
    with pytest.raises(UserError, match="is not a cache of"):
        import_latents(ImportConfig(layout, str(tmp_path), str(tmp_path / "out")))


def test_a_file_that_a_list_of_labels_names_but_is_missing_is_named(posterior_cache, tmp_path):
    export(ExportConfig(str(posterior_cache), "repa", str(tmp_path / "there")))
    (tmp_path / "there/00000/img-mean-std-00000003.npy").unlink()
    with pytest.raises(UserError, match=r"img-mean-std-00000003\.npy is missing"):
        import_latents(ImportConfig("repa", str(tmp_path / "there"), str(tmp_path / "back")))


def test_a_source_without_latents_and_statistics_that_are_none_are_refused(tmp_path):
    folder, _ = foreign(tmp_path)
    for bare in (torch.zeros(3), torch.zeros(1, 3, 1, 1)):
        torch.save(bare, folder / "latents_stats.pt")
        with pytest.raises(UserError, match=r"latents_stats\.pt is not a file of two tensors"):
            import_latents(ImportConfig("lightningdit", str(folder), str(tmp_path / "cache")))
    (folder / "latents_stats.pt").unlink()
    for path in folder.glob("*.safetensors"):
        save_file({"latents": np.zeros((0, 3, 4, 4), np.float32), "labels": np.zeros(0, np.int64)}, path)
    with pytest.raises(UserError, match="holds no latents"):
        import_latents(ImportConfig("lightningdit", str(folder), str(tmp_path / "cache")))


def test_a_cut_safetensors_file_is_named(tmp_path):
    folder, _ = foreign(tmp_path)
    path = folder / "latents_rank01_shard000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"latents_rank01_shard000\.safetensors can't be read as safetensors"):
        import_latents(ImportConfig("lightningdit", str(folder), str(tmp_path / "cache")))


def test_an_interrupted_import_goes_on_and_a_changed_source_is_another_one(tmp_path, monkeypatch):
    folder, latents = foreign(tmp_path)
    cfg = ImportConfig("lightningdit", str(folder), str(tmp_path / "cache"), samples_per_shard=25)
    import_latents(ImportConfig("lightningdit", str(folder), str(tmp_path / "straight"), samples_per_shard=25))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("latent_cache.peers.importing.statistics_of", interrupt)
        import_latents(cfg)
    import_latents(cfg)
    assert files(tmp_path / "cache") == files(tmp_path / "straight")
    tensors = load_file(folder / "latents_rank01_shard000.safetensors")
    save_file(tensors | {"latents": tensors["latents"] + 1}, folder / "latents_rank01_shard000.safetensors")
    with pytest.raises(UserError, match=r"other settings \(splits\.train\.fingerprint"):
        import_latents(cfg)


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_commands_make_one_from_the_other(mean_cache, tmp_path, capsys):
    assert main(["export", f"cache={mean_cache}", "format=fast-dit", f"out={tmp_path / 'there'}"]) == 0
    assert "50 latents of train as fast-dit" in capsys.readouterr().out
    arguments = ["import", "format=fast-dit", f"source={tmp_path / 'there'}", f"out={tmp_path / 'back'}"]
    assert main(arguments) == 0
    assert "50 train latents of shape 3x4x4" in capsys.readouterr().out
    assert main([*arguments, "samples_per_shard=0"]) == 2
    assert main(["import", "format=mar", "source=a", "out=b"]) == 2
    assert "must be one of fast-dit, lightningdit, repa" in capsys.readouterr().err
