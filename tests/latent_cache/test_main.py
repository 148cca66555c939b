"""The command line: help that tells the truth, exit statuses, one-line errors."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from latent_cache.__main__ import main
from ssdd.model.tokenizer import SSDD


def test_help_lists_the_commands_and_the_keys_of_each(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("build", "info", "verify", "stats", "export", "import"))
    assert main(["build", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: python -m latent_cache build" in text
    assert "tokenizer  (str; required)" in text and "content  (mean | moments; default mean)" in text
    assert "dry_run  (bool; default false)" in text
    assert "dataset.crop  (resize | adm; default adm)" in text and "views.flip  (bool; default false)" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bild"], "unknown command 'bild'"),
        (["build", "out=x"], "tokenizer=... must be given"),
        (["build", "tokenizer=none", "out=x", "content=men"], "did you mean mean?"),
        (["build", "tokenizer=none", "out=x", "view.flip=true"], "did you mean views.flip?"),
        (["info", "cache=nowhere"], "no latent cache at nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_build_then_info_then_verify(tokenizer, tmp_path, capsys):
    cache = tmp_path / "cache"
    dataset = ["dataset.source=digits", "dataset.im_size=16", "dataset.limit=20"]
    assert main(["build", f"tokenizer={tokenizer}", f"out={cache}", *dataset, "samples_per_shard=8", "device=cpu"]) == 0
    assert "20 train, 20 val latents of shape 2x2x2" in capsys.readouterr().out
    assert main(["info", f"cache={cache}"]) == 0
    assert "20 samples in 3 shards" in capsys.readouterr().out
    assert main(["verify", f"cache={cache}"]) == 0
    (cache / "val" / "000002.tar").unlink()
    shutil.copy(cache / "train" / "000000.tar", cache / "val" / "000003.tar")
    assert main(["verify", f"cache={cache}"]) == 1
    assert "2 found" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["mean", "moments"])
def test_a_dry_run_tells_the_size_that_the_build_then_has_and_writes_nothing(tokenizer, tmp_path, capsys, content):
    cache = tmp_path / "cache"
    dataset = ["dataset.source=digits", "dataset.im_size=16", "dataset.limit=50", "device=cpu", f"content={content}"]
    arguments = ["build", f"tokenizer={tokenizer}", f"out={cache}", *dataset, "samples_per_shard=16", "batch_size=8"]
    assert main([*arguments, "dry_run=true"]) == 0
    told = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and "nothing was written" in told
    assert "50 train, 50 val" in told and "8 of 16 or fewer" in told
    assert float(re.search(r"([\d.]+) per image", told)[1]) == pytest.approx(encoder_gflop(tokenizer), abs=0.01)
    assert float(re.search(r"([\d.e+-]+) hours", told)[1]) > 0
    assert main(arguments) == 0
    found = sum(path.stat().st_size for path in cache.rglob("*.tar"))
    assert int(re.search(r"(\d+) bytes of shards", told)[1]) == found


def encoder_gflop(tokenizer):
    """Of one 16 px image, by hooks on the convolutions and the attention's products: 2 FLOP a multiplication."""
    model, counted = SSDD.from_pretrained(tokenizer).eval(), []

    def count(layer, given, result):
        counted.append(2 * layer.weight[0].numel() * result.numel())

    for layer in model.encoder.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model.encode(torch.zeros(1, 3, 16, 16))
    return sum(counted) / 1e9


def test_a_dry_run_refuses_what_a_build_refuses(tokenizer, tmp_path, capsys):
    dataset = ["dataset.source=digits", "dataset.im_size=20", "dry_run=true"]
    assert main(["build", f"tokenizer={tokenizer}", f"out={tmp_path / 'x'}", *dataset]) == 2
    assert "im_size=20 is not a multiple of 8" in capsys.readouterr().err
