"""What was exported comes back as it went; foreign caches are imported, and damaged or hostile ones named."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from latent_cache import LatentDataset
from latent_cache.__main__ import main
from latent_cache.peers.export import ExportConfig, export
from latent_cache.peers.formats import FORMATS, readable
from latent_cache.peers.importing import ImportConfig, import_latents
from latent_cache.verify import verify
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json
from ssdd.model.latent import LatentNorm
from tests.kills import Command, files, later_and_later
from tests.latent_cache.synthetic import FINGERPRINT, normal, stored


@pytest.mark.parametrize("layout", ["fast-dit", "repa"])
def test_an_export_and_an_import_killed_again_and_again_end_with_the_same_bytes(mean_cache, tmp_path, layout):
    there, back = tmp_path / "there", tmp_path / "back"
    moments = later_and_later(first=7, step=5)
    export(ExportConfig(str(mean_cache), layout, str(tmp_path / "straight")))
    arguments = ["export", f"cache={mean_cache}", f"format={layout}", f"out={there}"]
    assert Command("latent_cache", arguments).run(moments).kills >= 5
    assert files(there) == files(tmp_path / "straight")
    import_latents(ImportConfig(layout, str(there), str(tmp_path / "straight_back"), samples_per_shard=5))
    arguments = ["import", f"format={layout}", f"source={there}", f"out={back}", "samples_per_shard=5"]
    assert Command("latent_cache", arguments).run(moments).kills >= 5
    assert files(back) == files(tmp_path / "straight_back")


@pytest.mark.parametrize("layout", readable())
def test_what_was_exported_comes_back_unchanged(mean_cache, posterior_cache, tmp_path, layout):
    peer = FORMATS[layout]
    folder = posterior_cache if peer.posteriors else mean_cache
    export(ExportConfig(str(folder), layout, str(tmp_path / "there")))
    import_latents(ImportConfig(layout, str(tmp_path / "there"), str(tmp_path / "back"), samples_per_shard=20))
    before, after = LatentDataset(folder), LatentDataset(tmp_path / "back", verify="full")
    first, again = stored(before)[0], stored(after)[0]
    if peer.normalised:
        assert torch.equal(first, again)
    else:  # float32 of raw values: nothing larger than the spacing of float32 at the raw mean is lost
        moved = (first - again).abs()
        assert moved[:, :3].max() <= 1e-6 and (moved[:, :3] > 0).float().mean() < 0.01
        assert (moved[:, 3:] <= 2e-3 * first[:, 3:].abs()).all()
    if peer.both_views:
        flips = [stored(cache, view=1)[0] for cache in (before, after)]
        assert (flips[0] - flips[1]).abs().max() <= 1e-6
    assert after.manifest["views"] == (before.manifest["views"] if peer.both_views else ["npy"])
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


def test_a_scaling_factor_that_is_named_is_taken_out_of_means_and_deviations(posterior_cache, mean_cache, tmp_path):
    for layout, folder in (("lightningdit", mean_cache), ("repa", posterior_cache)):
        export(ExportConfig(str(folder), layout, str(tmp_path / layout)))
        (tmp_path / layout / "export.json").unlink()
        found = []
        for factor in (None, 0.5):
            out = tmp_path / f"{layout}-{factor}"
            import_latents(ImportConfig(layout, str(tmp_path / layout), str(out), scaling_factor=factor))
            found.append(LatentDataset(out))
        once, twice = found
        assert torch.allclose(twice.norm.mean, 2 * once.norm.mean) and torch.allclose(twice.norm.std, 2 * once.norm.std)
        assert torch.allclose(stored(once)[0], stored(twice)[0], atol=2e-3)


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


@pytest.mark.parametrize("layout", readable())
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
