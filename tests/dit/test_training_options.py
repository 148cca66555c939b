"""Options of training: they resume to the same bytes together, look without touching, and refuse what misfits."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit.config import DiTAuxiliaryConfig, DiTConfig
from dit.foreign_checkpoints import export_dit
from dit.model import DiT
from dit.tasks.cache_images import CacheImages
from dit.tasks.sample import run as sample
from dit.tasks.train import run
from latent_cache import LatentDataset
from latent_cache.config import BuildConfig, ViewsConfig
from latent_cache.write.build import build
from ssdd.engine.checkpoint import load_tensors, save_tensors
from ssdd.engine.ema import EmaConfig
from ssdd.engine.errors import UserError
from ssdd.fidelity.measure import default_cache
from ssdd.images.sources import DatasetConfig
from ssdd.model.tokenizer import SSDD
from tests.dit.test_train import command, folder, in_step, metrics, weights

DIGITS = DatasetConfig(source="digits", im_size=32, limit=60, crop="adm")
TEACHER = "vit_tiny_patch16_224"


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights of a small vision transformer."""
    import timm

    place = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_tensors(place / f"{TEACHER}.safetensors", timm.create_model(TEACHER, pretrained=False).state_dict())
    return place


@pytest.fixture
def every_option(settings, teacher_weights, monkeypatch):
    """Config of a run with all that adds state or draws."""
    monkeypatch.setenv("SSDD_WEIGHTS", str(teacher_weights))

    def make(run_name: str, **training: object) -> DiTConfig:
        ema = EmaConfig(decays=[0.9, 0.05], start_iter=2)
        options = {"ema": ema, "lr_schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "t_shift": 2.0}
        cfg = settings(run_name, **{**options, **training})
        cfg.dataset, cfg.losses.direction, cfg.losses.repa = DIGITS, 0.5, 0.5
        cfg.aux_losses = DiTAuxiliaryConfig(replace(cfg.aux_losses.repa, model=TEACHER, i_extract=2, hidden=32))
        return cfg

    return make


def test_a_killed_run_with_every_option_resumes_to_the_same_bytes(every_option):
    straight, killed = every_option("straight"), every_option("killed")
    result = run(straight)
    command(killed).kill(in_step(7, averages=2))
    run(killed)
    assert weights(killed) == weights(straight)
    assert metrics(killed) == metrics(straight)
    rows = metrics(straight)
    for row in rows:
        terms = row["velocity"] + 0.5 * row["direction"] + 0.5 * row["repa"]
        assert row["loss"] == pytest.approx(terms, rel=1e-5)
    assert [row["lr"] for row in rows[:3]] == [1.5e-3, 3e-3, 3e-3] and rows[-1]["lr"] < 2e-4
    assert result["repa"] == rows[-1]["repa"]


def test_heads_and_further_averages_are_in_files_of_their_own(every_option):
    cfg = every_option("run", steps=5)
    run(cfg)
    last = folder(cfg) / "checkpoints" / "last"
    names = {"model", "model_ema", "model_ema_0.05", "aux", "optimizer"}
    assert {path.stem for path in last.glob("*.safetensors")} == names
    groups = {name: load_tensors(last / f"{name}.safetensors") for name in names}
    heads = {name for name in groups["aux"] if name.startswith("repa_loss.")}
    assert heads == {f"repa_loss.repa_mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert not any("repa" in name for group in names - {"aux"} for name in groups[group])
    assert set(groups["model_ema"]) == set(groups["model_ema_0.05"])
    slow, fast = (groups[name]["final_layer.linear.weight"] for name in ("model_ema", "model_ema_0.05"))
    newest = groups["model"]["final_layer.linear.weight"]
    assert (fast - newest).norm() < (slow - newest).norm()


def test_any_of_several_averages_can_be_sampled(every_option, tmp_path):
    cfg = every_option("run", steps=5)
    run(cfg)
    cfg = replace(cfg, sampling=replace(cfg.sampling, n=2, steps=2, batch_size=2))
    drawn = {}
    for decay in (None, 0.05):
        cfg.sampling.ema, cfg.out = decay, str(tmp_path / f"samples-{decay}")
        drawn[decay] = load_tensors(sample(cfg) / "latents.safetensors")["z_n"]
    assert not torch.equal(drawn[None], drawn[0.05])
    cfg.sampling.ema = 0.7
    with pytest.raises(UserError, match=r"model_ema_0.7.*only model_ema.safetensors, model_ema_0.05.safetensors"):
        sample(cfg)


@pytest.mark.slow
def test_two_killed_processes_resume_to_the_same_bytes(every_option):
    straight, killed = every_option("straight"), every_option("killed")
    command(straight, processes=2).run()
    command(killed, processes=2).kill(in_step(7, averages=2))
    assert json.loads((folder(killed) / "checkpoints" / "last" / "state.json").read_text())["step"] == 4
    command(killed, processes=2).run()
    assert weights(killed) == weights(straight)


@pytest.mark.parametrize("flip", [False, True])
def test_the_images_beside_a_batch_are_those_that_its_latents_were_encoded_from(caches, tmp_path, flip):
    tokenizer = str(caches["mean"].parent / "tokenizer")
    dataset = replace(DIGITS, flip=flip)
    out = str(tmp_path / "cache")
    build(BuildConfig(tokenizer, out, splits=["train"], dataset=dataset, views=ViewsConfig(flip), device="cpu"))
    cache = LatentDataset(out)
    order = {"batch_size": 12, "seed": 5, "start_step": 3, "rank": 1, "world": 2}
    encoder, pairs = (
        SSDD.from_pretrained(tokenizer).eval(),
        zip(cache.batches(**order), CacheImages(dataset, cache).batches(**order), strict=False),
    )
    for (z, _, _), images in itertools.islice(pairs, 4):  # into the next epoch
        with torch.no_grad():
            expected = cache.norm.normalise(encoder.encode(images).mode())
        torch.testing.assert_close(z, expected, atol=5e-3, rtol=5e-3)  # stored in half precision


def test_other_images_than_those_of_the_cache_are_refused_with_the_keys_to_set(every_option):
    cfg = every_option("run")
    cfg.dataset = DatasetConfig()
    with pytest.raises(UserError, match="set dataset.source=digits dataset.im_size=32 dataset.crop=adm"):
        run(cfg)
    cfg.dataset = replace(DIGITS, limit=50)
    with pytest.raises(UserError, match="the 50 images .* not the 60"):
        run(cfg)
    assert not folder(cfg).exists()


def test_the_images_of_an_imported_cache_are_not_known(caches):
    cache = LatentDataset(caches["mean"])
    CacheImages(DIGITS, cache)
    cache.manifest["encoding"] = {"imported_from": "repa"}
    with pytest.raises(UserError, match="imported from repa.*losses.repa=0 and training.fidelity_every=0"):
        CacheImages(DIGITS, cache)


def test_online_fidelity_is_logged_and_changes_no_byte(settings, caches, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    plain, measured = settings("plain", steps=4), settings("measured", steps=4)
    run(plain)
    options = {"fidelity_every": 2, "fidelity_samples": 6, "sample_every": 0}
    options["tokenizer"] = str(caches["mean"].parent / "tokenizer")
    measured.training = replace(measured.training, **options)
    measured.dataset, measured.sampling = DIGITS, replace(measured.sampling, steps=2, batch_size=4)
    run(measured)
    assert weights(measured) == weights(plain)
    found = [row for row in metrics(measured) if "fidelity/kid_efficientnet_lite0" in row]
    assert [row["step"] for row in found] == [2, 4]
    assert all(row["fidelity/frechet_efficientnet_lite0"] > 0 for row in found)
    assert found[0] | {"step": 4} != found[1]
    features = list(default_cache().iterdir())
    assert len(features) == 1 and len(load_tensors(features[0])["features"]) == 60
    with pytest.raises(UserError, match="training.fidelity_every needs training.tokenizer"):
        run(settings(fidelity_every=2))


def test_a_dry_run_counts_and_measures_without_writing(settings, tmp_path, capsys):
    cfg = replace(settings(steps=100, grad_accumulate=2), dry_run=True)
    before = sorted(tmp_path.rglob("*"))
    result = run(cfg)
    model = DiT.from_name("DiT-XXS/1", 4, 2, 10, learn_sigma=False)
    assert result["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert result["hours"] == pytest.approx(100 * result["seconds_a_step"] / 3600)
    # 16 tokens pass every matrix of the blocks, twice as much work comes back, two FLOP a multiply-add
    assert result["gflop_latent"] > 3 * 2 * 16 * 4 * (4 + 8) * 128**2 / 1e9
    assert "8 latents per process and part" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_refuses_what_training_refuses(settings):
    for wrong, message in (({"grad_accumulate": 3}, "does not divide"), ({"log_freq": 0}, "log_freq=0 must be")):
        with pytest.raises(UserError, match=message):
            run(replace(settings(**wrong), dry_run=True))


def test_training_starts_from_weights_of_ours_or_in_sits_layout(settings, tmp_path):
    first = settings("first", steps=30)
    first.model.time_scale = 1.0
    run(first)
    ours = DiT.from_pretrained("first", first.ckpt_dir)
    rates = {"steps": 1, "lr": 1e-9}
    tuned, foreign = settings("tuned", **rates), settings("foreign", **rates)
    tuned.model = replace(first.model, checkpoint="first")
    foreign.model = replace(first.model, checkpoint=str(export_dit(ours, tmp_path / "sit.safetensors", layout="sit")))
    losses = [run(cfg)["velocity"] for cfg in (tuned, foreign)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0] < 0.9 * metrics(first)[0]["velocity"]
    assert DiT.from_pretrained("foreign", tmp_path).config["convention"] == "sit"
    torch.testing.assert_close(
        DiT.from_pretrained("tuned", tmp_path).state_dict(), ours.state_dict(), atol=1e-6, rtol=1e-5
    )


def test_a_checkpoint_that_misfits_is_refused_with_the_keys_to_set(settings, tmp_path):
    first = settings("first", steps=1)
    first.model.qk_norm = True
    run(first)
    tuned = settings("tuned", steps=1)
    tuned.model = replace(tuned.model, checkpoint="first", name="DiT-XS/1")
    with pytest.raises(UserError, match="set model.name=DiT-XXS/1 model.qk_norm=true"):
        run(tuned)
    DiT.from_name("DiT-XXS/1", 4, 3, 10, learn_sigma=False).save_pretrained(tmp_path / "channels")
    DiT.from_name("DiT-XXS/1", 4, 2, 7, learn_sigma=False).save_pretrained(tmp_path / "classes")
    DiT.from_name("DiT-XXS/8", 8, 2, 10, learn_sigma=False).save_pretrained(tmp_path / "patches")
    for name, message in {
        "channels": "latents of 3 channels, not 2: use the tokenizer",
        "classes": "7 classes, not 10: .*model.reset_labels=true",
        "patches": "4x4 does not divide into patches of 8",
    }.items():
        tuned.model = replace(first.model, qk_norm=False, checkpoint=str(tmp_path / name))
        with pytest.raises(UserError, match=message):
            run(tuned)
    assert not folder(tuned).exists()
    tuned.model = replace(tuned.model, checkpoint=str(tmp_path / "classes"), reset_labels=True)
    run(tuned)
    assert DiT.from_pretrained("tuned", tmp_path).num_classes == 10


def test_options_that_change_what_is_trained_do_not_continue_a_run(settings):
    cfg = settings(steps=1)
    run(cfg)
    cfg = settings(steps=2)
    cfg.losses.direction = 1.0
    with pytest.raises(UserError, match=r"terms was \['velocity'\], is \['velocity', 'direction'\]"):
        run(cfg)
    with pytest.raises(UserError, match="averages was"):
        run(settings(steps=2, ema=EmaConfig(decays=[0.9, 0.99])))
    with pytest.raises(UserError, match="several different ones"):
        run(settings("other", ema=EmaConfig(decays=[0.9, 0.9])))
