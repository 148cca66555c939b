"""gFID evaluation of a sample set: the same latents for every decoder, and sets that do not belong are refused."""

from __future__ import annotations

import pytest
import torch

from dit.config import DiTConfig
from dit.evaluation.evaluate import run
from ssdd import SSDD, LatentNorm
from ssdd.engine.checkpoint import save_tensors
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.files import write_json
from ssdd.fidelity.judge import SmallClassifier, train_classifier
from ssdd.images.batches import read_split
from ssdd.images.sources import DatasetConfig


@pytest.fixture
def sample_set(tmp_path):
    """20 latents of two raw numbers a position, with the statistics of a random tokenizer."""
    torch.manual_seed(0)
    model = SSDD({"name": "f8c2", "width": 8}, "XXS")
    model.save_pretrained(tmp_path / "tokenizer")
    LatentNorm.identity(2, model.encoder_fingerprint()).save(tmp_path / "samples" / "z_stats.json")
    tensors = {"z_n": torch.randn(20, 2, 2, 2), "labels": torch.arange(20) % 10}
    save_tensors(tmp_path / "samples" / "latents.safetensors", tensors)
    write_json(tmp_path / "samples" / "sample_set.json", {"n": 20, "balanced": True})
    return tmp_path


def evaluate(folder, *arguments: str) -> dict:
    tokenizer = folder / "tokenizer"
    argv = [
        "task=evaluate",
        "sampling.mixed_precision=no",
        "evaluation.mixed_precision=no",
        f"samples={folder / 'samples'}",
        f"ckpt_dir={folder}",
        f"out={folder / 'evaluation'}",
        f"evaluation.decoders=[one:{tokenizer}:1,same:{tokenizer}:1,two:{tokenizer}:2]",
        "evaluation.features=[efficientnet_lite0]",
        "dataset.source=digits",
        "dataset.im_size=16",
        "dataset.limit=60",
        *arguments,
    ]
    return run(parse(DiTConfig, argv, program="dit", description=""))


def test_equal_decoders_score_equally_and_batches_do_not_matter(sample_set):
    images, labels, classes = read_split(DatasetConfig(source="digits", im_size=16), "train")
    train_classifier(images, labels, classes, steps=100).save(sample_set / "classifier.safetensors")
    large = evaluate(
        sample_set, f"evaluation.classifier={sample_set / 'classifier.safetensors'}", "evaluation.baseline_numbers=8"
    )
    small = evaluate(sample_set, "evaluation.batch_size=7")
    rows = {row["name"]: row for row in large["rows"]}
    scores = {name: row["distances"]["efficientnet_lite0"] for name, row in rows.items()}
    assert list(rows) == ["one", "same", "two", "PCA-Gaussian"]
    assert scores["one"] == scores["same"] and scores["one"]["kid"] != scores["two"]["kid"]
    assert scores["PCA-Gaussian"]["kid"] < scores["one"]["kid"]  # an untrained decoder is worse than the baseline
    assert rows["PCA-Gaussian"]["class_accuracy"] > 0.8 > rows["one"]["class_accuracy"]
    assert large["class_accuracy_held_out"] > 0.8 and large["reference"]["crop"] == "adm"
    for row in small["rows"]:
        assert row["distances"]["efficientnet_lite0"]["frechet"] == pytest.approx(
            scores[row["name"]]["frechet"], rel=1e-4
        )
    pictures = {path.stem for path in (sample_set / "evaluation" / "pictures").iterdir()}
    assert pictures == {"one", "same", "two"}


def test_a_classifier_of_fewer_classes_is_no_judge(sample_set):
    SmallClassifier(9).save(sample_set / "nine.safetensors")
    with pytest.raises(UserError, match="was trained on classes 0 to 8, samples have label 9"):
        evaluate(sample_set, f"evaluation.classifier={sample_set / 'nine.safetensors'}")


def test_latents_of_another_encoder_another_size_or_nothing_are_refused(sample_set):
    with pytest.raises(UserError, match="im_size=32"):
        evaluate(sample_set, "dataset.im_size=32")
    with pytest.raises(UserError, match="samples=DIR"):
        evaluate(sample_set, "evaluation.decoders=[]")
    torch.manual_seed(1)
    SSDD({"name": "f8c2", "width": 8}, "XXS").save_pretrained(sample_set / "tokenizer")
    with pytest.raises(UserError, match="another encoder"):
        evaluate(sample_set)
