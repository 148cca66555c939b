"""The command line: help that tells the truth, exit statuses, one-line errors."""

from __future__ import annotations

import shutil

import pytest

from latent_cache.__main__ import main


def test_help_lists_the_commands_and_the_keys_of_each(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("build", "info", "verify"))
    assert main(["build", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: python -m latent_cache build" in text
    assert "tokenizer  (str; required)" in text and "content  (mean | moments; default mean)" in text
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
