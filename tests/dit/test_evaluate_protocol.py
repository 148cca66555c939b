"""The protocol around the distances: latents drawn once, interruptions, processes, references, gap, exports, sweeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import DiTConfig
from dit.evaluation.evaluate import run
from dit.evaluation.latent_sets import with_noise
from dit.model import DiT
from ssdd import SSDD, LatentNorm
from ssdd.engine.checkpoint import save_tensors
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.random import indexed_noise
from ssdd.fidelity.frechet import frechet_distance
from ssdd.fidelity.judge import SmallClassifier
from ssdd.fidelity.kid import kernel_distance
from ssdd.fidelity.measure import load_statistics
from tests.kills import Command, later_and_later

ROOT = Path(__file__).resolve().parents[2]
SPEEDS = ("images_per_s", "sampling_images_per_s", "decoder_share")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random tokenizer, a random generator that says it was trained on its latents, and random features."""
    torch.manual_seed(0)
    tokenizer = SSDD({"name": "f8c2", "width": 8}, "XXS")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    generator = DiT.from_name("DiT-XXS/1", input_size=2, in_channels=2, num_classes=10)
    told = {
        "z_stats": LatentNorm.identity(2, tokenizer.encoder_fingerprint()).to_dict(),
        "images": {"source": "digits", "im_size": 16, "crop": "adm"},
    }
    metadata = {**generator.metadata(), "trained_on": json.dumps(told)}
    save_tensors(tmp_path / "generator.safetensors", generator.state_dict(), metadata)
    SmallClassifier(10).save(tmp_path / "classifier.safetensors")
    return tmp_path


def arguments(folder: Path, *more: str, out: str = "evaluation", run_name: str = "dit") -> list[str]:
    return [
        "task=evaluate",
        "sampling.mixed_precision=no",
        "evaluation.mixed_precision=no",
        f"run_name={run_name}",
        f"ckpt_dir={folder / out}",
        f"out={folder / out}",
        f"evaluation.cache={folder / out / 'cache'}",
        f"sampling.checkpoint={folder / 'generator.safetensors'}",
        "sampling.n=20",
        "sampling.steps=1",
        "sampling.cfg_scale=1.0",
        f"evaluation.decoders=[one:{folder / 'tokenizer'}:1]",
        f"evaluation.features=[classifier:{folder / 'classifier.safetensors'}]",
        "evaluation.batch_size=8",
        "evaluation.resamples=20",
        "dataset.source=digits",
        "dataset.im_size=16",
        "dataset.limit=40",
        *more,
    ]


def evaluate(folder: Path, *more: str, **where: str) -> dict:
    return run(parse(DiTConfig, arguments(folder, *more, **where), program="dit", description=""))


def figures(result: dict) -> dict:
    """A result without what depends on the clock, the memory, the command, or the number of processes."""
    rows = [{key: value for key, value in row.items() if key not in SPEEDS} for row in result["rows"]]
    return {k: v for k, v in result.items() if k not in ("peak_memory_bytes", "measured")} | {"rows": rows}


def only(of_networks: dict) -> dict:
    """What is told of the one feature network."""
    (value,) = of_networks.values()
    return value


def numbers(values: object) -> list[float]:
    """All numbers of a nested result, in order."""
    if isinstance(values, dict | list):
        inner = values.values() if isinstance(values, dict) else values
        return [number for value in inner for number in numbers(value)]
    return [values] if isinstance(values, int | float) else []


def times(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def test_latents_are_drawn_once_and_a_second_decoder_leaves_them_and_the_first_ones_figures(folder):
    first = evaluate(folder)
    row = first["rows"][0]
    assert 0 < row["decoder_share"] < 1 and row["sampling_images_per_s"] < row["images_per_s"]
    latents = times(folder, "latents.safetensors")
    measured = times(folder, "measured.json") | times(folder / "evaluation" / "cache", "*.safetensors")
    assert len(latents) == 1 and len(measured) == 4  # samples and reconstructions; training and held-out images
    tokenizer = folder / "tokenizer"
    second = evaluate(folder, f"evaluation.decoders=[one:{tokenizer}:1,two:{tokenizer}:2]")
    assert times(folder, "latents.safetensors") == latents
    assert {path: path.stat().st_mtime_ns for path in measured} == measured
    assert [row["name"] for row in second["rows"]] == ["one", "two"]
    assert second["rows"][0]["distances"] == row["distances"]
    # A decoder of the same name that does something else is measured again.
    other = evaluate(folder, f"evaluation.decoders=[one:{tokenizer}:2]")
    assert other["rows"][0]["distances"] == second["rows"][1]["distances"]
    assert times(folder, "latents.safetensors") == latents


def test_a_result_says_where_its_figures_come_from(folder):
    result = evaluate(folder)
    decoder, reference = result["decoders"]["one"], result["reference"]
    assert len(decoder["weights"]) == len(decoder["encoder_fingerprint"]) == 64 and decoder["steps"] == 1
    assert (reference["source"], reference["crop"], reference["size"], reference["count"]) == (
        "digits", "adm", [16, 16], 40,
    )  # fmt: skip
    assert only(result["networks"])["checksum"] == only(result["features"])
    assert only(result["networks"])["resize"] == "none" and "round" in result["rounding"]
    assert result["labels"].startswith("balanced") and "10 classes, 2 to 2" in result["labels"]
    assert any("fewer than 10 per dimension" in note for note in result["notes"])
    assert not list((folder / "evaluation" / "measured").rglob("chunks"))  # their features are not kept twice


@pytest.mark.filterwarnings("ignore:Frechet distance of")
def test_samples_are_also_held_against_images_that_the_generator_never_saw(folder):
    result = evaluate(folder, "evaluation.gap=false")
    scores = only(result["rows"][0]["distances"])
    samples = load_statistics(next((folder / "evaluation" / "measured").rglob("statistics-0.safetensors")))[0]
    real = {
        provenance["fingerprint"]: statistics
        for statistics, provenance in map(load_statistics, (folder / "evaluation" / "cache").rglob("*.safetensors"))
    }
    for which, suffix in (("reference", ""), ("held_out", "_to_held_out")):
        split = result[which]["fingerprint"]
        assert scores[f"kid{suffix}"] == pytest.approx(kernel_distance(samples.features, real[split].features))
        assert scores[f"frechet{suffix}"] == pytest.approx(frechet_distance(samples, real[split]))
        assert scores[f"kid_low{suffix}"] < scores[f"kid_high{suffix}"]
    assert scores["kid"] != scores["kid_to_held_out"]


def test_a_reference_of_another_crop_is_refused_before_anything_is_decoded_unless_allowed(folder):
    with pytest.raises(UserError, match="crops differ.*evaluation.allow_mismatch=true"):
        evaluate(folder, "dataset.crop=resize")
    assert not (folder / "evaluation" / "measured").exists()
    result = evaluate(folder, "dataset.crop=resize", "evaluation.allow_mismatch=true", "evaluation.gap=false")
    assert "crops differ" in result["notes"][0]


def test_a_decoder_of_another_encoder_is_refused_before_latents_are_drawn(folder):
    torch.manual_seed(1)
    SSDD({"name": "f8c2", "width": 8}, "XXS").save_pretrained(folder / "tokenizer")
    with pytest.raises(UserError, match="another encoder"):
        evaluate(folder)
    assert not times(folder, "latents.safetensors")


def test_fewer_kept_features_leave_the_frechet_distances_and_name_the_images_of_the_copy_rate(folder):
    every = evaluate(folder, "evaluation.gap=false")
    fewer = evaluate(folder, "evaluation.gap=false", "evaluation.kept_features=15", "sampling.n=20")
    full, part = (only(result["rows"][0]["distances"]) for result in (every, fewer))
    assert part["frechet"] == pytest.approx(full["frechet"], rel=1e-9)
    assert (full["copy_rate_training_images"], part["copy_rate_training_images"]) == (40, 15)
    assert part["kid"] != full["kid"]


def test_somebody_elses_reference_takes_the_place_of_the_training_images(folder):
    pixels = np.random.RandomState(0).randint(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=pixels)
    result = evaluate(folder, f"evaluation.reference={folder / 'reference.npz'}", "evaluation.held_out=false")
    scores = only(result["rows"][0]["distances"])
    assert result["reference"]["count"] == 12 and {"kid", "precision"} <= set(scores)
    assert "copy_rate" not in scores and result["floor"] == {}


def test_a_reference_of_another_network_and_a_missing_judge_are_refused_before_anything_is_drawn(folder):
    np.savez(folder / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="was measured with inception"):
        evaluate(folder, f"evaluation.reference={folder / 'adm.npz'}")
    with pytest.raises(UserError, match="holds no classifier"):
        evaluate(folder, f"evaluation.classifier={folder / 'absent.safetensors'}")
    with pytest.raises(UserError, match="no weights for 'absent'"):
        evaluate(folder, "sampling.checkpoint=absent", "evaluation.sweep_steps=[1]", f"samples={folder}")
    assert times(folder, "latents.safetensors") == times(folder, "*.chunks") == {}


def test_a_floor_of_fewer_images_than_samples_is_noted(folder):
    notes = [evaluate(folder, f"dataset.limit={n}", "evaluation.gap=false", out=str(n))["notes"] for n in (10, 40)]
    assert [sum("the floor is that of 10 held-out" in note for note in of) for of in notes] == [1, 0]


def test_a_baseline_is_made_again_for_other_training_images_beside_a_foreign_reference(folder):
    np.savez(folder / "reference.npz", arr_0=np.random.RandomState(0).randint(0, 256, (12, 16, 16, 3), dtype=np.uint8))
    keys = (f"evaluation.reference={folder / 'reference.npz'}", "evaluation.held_out=false", "evaluation.gap=false")
    keys += ("evaluation.baseline_numbers=4",)
    first, again, other = (
        evaluate(folder, *keys, f"dataset.limit={limit}")["rows"][1]["distances"] for limit in (40, 40, 60)
    )
    assert first == again != other


def test_the_gap_is_the_distance_of_samples_minus_that_of_reconstructions_and_noise_begins_at_none(folder):
    result = evaluate(folder, "evaluation.latent_noise=[0.5,0.1]")
    gap, lines = only(result["gap"])["one"], only(result["latent_noise"])["one"]
    assert gap["gfid"] == only(result["rows"][0]["distances"])["frechet"]
    assert gap["gap"] == pytest.approx(gap["gfid"] - gap["rfid"])
    assert [line["noise"] for line in lines] == [0, 0.1, 0.5]
    assert lines[0]["frechet_to_originals"] == gap["rfid"] and lines[0]["frechet"] == gap["rfid_to_reference"]
    assert len({line["frechet_to_originals"] for line in lines}) == 3
    # The result of one level does not depend on which others were asked for.
    alone = only(evaluate(folder, "evaluation.latent_noise=[0.5]", out="alone")["latent_noise"])["one"]
    assert alone == [lines[0], lines[2]]


def test_noise_on_latents_has_the_deviation_asked_for_and_is_that_of_the_image():
    z_n = torch.randn(6, 4, 16, 16)
    noisy, images = with_noise(lambda indices: (z_n, torch.arange(6)), 0.3, seed=0)(range(6))
    assert (noisy - z_n).std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.allclose((noisy - z_n)[4], 0.3 * indexed_noise([4], (4, 16, 16), 0, "latent noise")[0], atol=1e-6)


def test_the_exported_npz_has_the_images_of_the_png_files(folder):
    evaluate(folder, "evaluation.gap=false")
    exported = ("evaluation.gap=false", "evaluation.npz=true", "evaluation.png=true")
    evaluate(folder, *exported)  # the figures were there, the images were not
    folder_of_files = folder / "evaluation" / "export" / "one"
    with np.load(folder / "evaluation" / "export" / "one.npz", allow_pickle=False) as file:
        pixels, labels = file["arr_0"], file["arr_1"]
    files = sorted(folder_of_files.iterdir())
    assert pixels.shape == (20, 16, 16, 3) and labels.tolist() == [i % 10 for i in range(20)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), pixels)
    before = times(folder / "evaluation", "measured.json")
    evaluate(folder, *exported)
    assert times(folder / "evaluation", "measured.json") == before


def test_a_sweep_measures_every_setting_once_and_plots_them(folder):
    keys = ("evaluation.sweep_cfg=[1.0,2.0]", "evaluation.sweep_steps=[1,2]", "evaluation.sweep_n=10")
    result = evaluate(folder, "evaluation.gap=false", *keys)
    lines = result["sweep"]
    assert [(line["cfg_scale"], line["steps"]) for line in lines] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(only(line["distances"]["one"])["frechet"] > 0 for line in lines)
    assert b"<svg" in (folder / "evaluation" / "sweep.svg").read_bytes()
    latents = times(folder / "evaluation" / "sweep", "latents.safetensors")
    again = evaluate(folder, "evaluation.gap=false", *keys)
    assert again["sweep"] == lines and times(folder / "evaluation" / "sweep", "latents.safetensors") == latents


def command(*words: str) -> dict[str, object]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    return result


@pytest.mark.slow
def test_killed_at_any_moment_it_continues_to_the_same_figures(folder):
    judge = f"evaluation.classifier={folder / 'classifier.safetensors'}"
    keys = ("evaluation.npz=true", judge, "evaluation.baseline_numbers=4")
    straight = command("-m", "dit.main", *arguments(folder, *keys, out="straight"))
    assert "generation gap" in straight.stdout
    late = ("sklearn.datasets", "timm", "dit.evaluation.evaluate")
    killed = Command("dit.main", arguments(folder, *keys, out="killed"), imports=late)
    assert killed.run(later_and_later(first=11, step=6)).kills >= 4
    results = [json.loads((folder / name / "task_result.json").read_text()) for name in ("straight", "killed")]
    assert figures(results[0]) == figures(results[1])
    exports = [(folder / name / "export" / "one.npz").read_bytes() for name in ("straight", "killed")]
    assert exports[0] == exports[1]


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 5])  # 5: one of the processes has no sample
def test_two_processes_give_the_figures_of_one(folder, n):
    keys = (f"sampling.n={n}", "evaluation.latent_noise=[0.2]", "evaluation.kept_features=15", "evaluation.png=true")
    one = evaluate(folder, *keys, out="alone")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "dit" / "main.py"))
    command(*launch, *arguments(folder, *keys, out="two"))
    two = json.loads((folder / "two" / "task_result.json").read_text())
    measured = [folder / name / "measured" / "samples" / "one" for name in ("alone", "two")]
    assert measured[0].joinpath("statistics-0.safetensors").read_bytes() == (
        measured[1].joinpath("statistics-0.safetensors").read_bytes()
    )
    # Real images go through the network in other batches, which rounds otherwise.
    for key in ("rows", "floor", "gap", "latent_noise"):
        alone, both = (numbers(figures(result)[key]) for result in (one, two))
        assert len(alone) > 3 and alone == pytest.approx(both, rel=1e-6, abs=1e-8)
    assert len(list((folder / "two" / "export" / "one").iterdir())) == n
