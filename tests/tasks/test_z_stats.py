"""Task z_stats: independent of the batch size, and refused when there is nothing to measure."""

from __future__ import annotations

import pytest

from ssdd import LatentNorm
from ssdd.engine.checkpoint import save_tensors
from ssdd.engine.errors import UserError
from ssdd.tasks.z_stats import run


def test_the_file_is_free_of_the_batch_size_and_normalises_for_its_own_encoder_only(tokenizer, config, tmp_path):
    tokenizer.save_pretrained(tmp_path / "weights")
    arguments = ["task=z_stats", f"ssdd.checkpoint={tmp_path / 'weights'}"]
    norms = []
    for size in (32, 5):
        result = run(config(*arguments, f"run_name=stats{size}", f"evaluation.batch_size={size}"))
        path = tmp_path / "jobs" / f"stats{size}" / "z_stats.json"
        norms.append(LatentNorm.load(path, tokenizer.encoder_fingerprint()))
        assert (result["z_mean"], result["z_std"]) == (norms[-1].z_mean, norms[-1].z_std)
        assert result["precision"]["mixed_precision"] == "no"
    large, small = norms
    assert large.count == small.count == 32
    assert large.mean.tolist() == pytest.approx(small.mean.tolist(), rel=1e-5, abs=1e-6)
    assert large.std.tolist() == pytest.approx(small.std.tolist(), rel=1e-5)
    with pytest.raises(UserError, match="another encoder"):
        LatentNorm.load(path, "0" * 64)


def test_without_weights_it_says_what_to_give(config):
    with pytest.raises(UserError, match="ssdd.encoder_checkpoint="):
        run(config("task=z_stats"))
    with pytest.raises(UserError, match="no weights for 'nobody'"):
        run(config("task=z_stats", "ssdd.encoder_checkpoint=nobody"))


def test_a_file_of_the_encoder_alone_is_enough(tokenizer, config, tmp_path):
    weights = {f"encoder.{name}": value for name, value in tokenizer.encoder.state_dict().items()}
    save_tensors(tmp_path / "encoder.safetensors", weights)
    run(config("task=z_stats", f"ssdd.encoder_checkpoint={tmp_path / 'encoder.safetensors'}"))
    path = tmp_path / "jobs" / "tokenizer" / "z_stats.json"
    assert LatentNorm.load(path, tokenizer.encoder_fingerprint()).count == 32
