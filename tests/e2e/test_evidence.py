"""The comparison with the baselines runs to its table, and a second run only prints it again."""

from __future__ import annotations

import pytest

from ssdd_pipeline.evidence import main


@pytest.mark.slow
def test_the_comparison_ends_with_a_table_of_all_decoders(tmp_path, capsys):
    arguments = ["name=tiny", f"ckpt_dir={tmp_path}", f"out={tmp_path / 'docs'}", "minutes=0.03", "seeds=2"]
    arguments += ["dataset.source=digits", "dataset.im_size=16", "dataset.limit=40", "dataset.batch_size=8"]
    assert main([*arguments, "encoder=f8c2", "encoder_width=8"]) == 0
    text = (tmp_path / "docs" / "tiny.md").read_text()
    for row in ("teacher-8", "teacher-1", "student-1", "direct-1", "kl-1", "PCA-8", "blur"):
        assert f"| {row} |" in text
    assert text.count("- student-1 - direct-1: ") == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny" / "jobs").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*arguments, "encoder=f8c2", "encoder_width=8"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tiny" / "jobs").rglob("*") if p.is_file()} == before
