"""The whole chain on a few images: it runs, skips what is done, continues what was killed, and takes any source."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ssdd.engine.checkpoint import load
from ssdd.images.sources import DatasetConfig, open_source
from ssdd_pipeline.run import largest_peak
from tests.e2e.conftest import table_without_speed
from tests.kills import AtOutput

STAGES = ["classifier", "tokenizer", "student", "reconstruction", "cache", "dit", "samples", "generation"]


def test_the_chain_ends_with_a_table_and_a_report_and_a_second_run_skips_every_stage(pipeline):
    chain = pipeline("digits")
    output = chain.run()
    for row in ("teacher-3", "teacher-1", "student-1", "PCA-8", "PCA-Gaussian", "blur"):
        assert re.search(rf"^{row} .*\d", output, re.M), output
    assert re.search(r"^precision: .*cache: always float32.*samples.*: auto: ", output, re.M), output
    page = (chain.root / "report.html").read_text()
    assert 'src="data:image/png;base64,' in page and "://" not in re.sub(r'src="data:[^"]*"', "", page)

    before = {path: path.stat().st_mtime_ns for path in (chain.root / "jobs").rglob("*") if path.is_file()}
    again = chain.run()
    assert again.count("done before") == len(STAGES)
    assert table_without_speed(again) == table_without_speed(output)
    assert {path: path.stat().st_mtime_ns for path in (chain.root / "jobs").rglob("*") if path.is_file()} == before


def test_a_wrong_key_of_a_late_stage_is_found_before_the_first_one_starts(pipeline):
    process = pipeline("digits", "dit.training.stepz=4").start()
    output = process.communicate()[0]
    assert process.returncode == 2
    assert "stage dit" in output and "training.steps" in output and "[1/" not in output


@pytest.mark.slow
def test_killed_in_the_middle_of_every_stage_it_ends_with_the_same_table(pipeline):
    expected = table_without_speed(pipeline("straight").run())
    moments = [
        AtOutput(rf"^(train|distil) {stage} 1/")  # after the first step
        if stage in ("tokenizer", "student", "dit")
        else AtOutput(rf"^\[{number}/8\] {stage}: python", delay=4)  # into its imports, or its work
        for number, stage in enumerate(STAGES, 1)
    ]
    outcome = pipeline("killed").run_killed(moments)
    assert outcome.kills == len(STAGES)
    assert table_without_speed(outcome.output) == expected


@pytest.mark.slow
def test_a_signal_ends_the_stage_after_a_checkpoint_and_no_further_one_starts(pipeline):
    chain = pipeline("digits")
    process = chain.start()
    for line in process.stdout:
        if line.startswith("train tokenizer 1/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 3
    assert "[2/8] tokenizer: interrupted" in rest and "[3/8]" not in rest
    assert 1 <= load(chain.root / "jobs" / "tokenizer" / "checkpoints" / "last")[1]["step"] < 8
    assert "student-1" in chain.run()


@pytest.mark.slow
def test_a_changed_setting_repeats_its_stage_and_what_follows_only(pipeline):
    pipeline("digits").run()
    output = pipeline("digits", "dit.training.lr=2e-3").run()
    assert output.count("done before") == 5
    assert not re.search(r"\] (dit|samples|generation): done before", output)


@pytest.mark.slow
def test_a_forced_precision_makes_every_stage_anew_and_the_table_says_so(pipeline, monkeypatch):
    for precision in ("no", "bf16"):
        monkeypatch.setenv("SSDD_PRECISION", precision)
        output = pipeline("digits").run()
        assert "done before" not in output
        stages = "tokenizer, student, reconstruction, dit, samples, generation"
        assert f"classifier, cache: always float32; {stages}: auto: {precision}, SSDD_PRECISION" in output


@pytest.mark.slow
def test_the_same_pipeline_runs_on_a_folder_of_pngs(pipeline, tmp_path):
    for split in ("train", "val"):
        source = open_source(DatasetConfig(source="digits", im_size=20, limit=60), split)
        for i in range(len(source)):
            folder = tmp_path / "images" / split / source.class_names[source.labels[i]]
            folder.mkdir(parents=True, exist_ok=True)
            source.image(i).save(folder / f"{i}.png")
    Image.new("RGB", (31, 17)).save(tmp_path / "images" / "train" / "0" / "wide.png")
    chain = pipeline(
        "folder", "dataset.source=imagefolder", f"dataset.root={tmp_path / 'images'}", "dataset.flip=false"
    )
    assert "student-1" in chain.run()
    result = json.loads((chain.root / "jobs" / "generation" / "task_result.json").read_text())
    assert result["reference"]["source"] == "imagefolder"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells the memory of another process")
def test_the_memory_of_a_stage_is_that_of_its_largest_process_and_not_of_the_one_that_started_it():
    held = bytearray(200 << 20)
    program = "import sys; held = bytearray(64 << 20); print('ready', flush=True); sys.stdin.read()"
    shell = ["sh", "-c", f'"{sys.executable}" -c "{program}"; true']
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        assert 64 << 20 < largest_peak(process.pid) < len(held)
        assert largest_peak(os.getpid()) > len(held)
    assert largest_peak(process.pid) == 0
