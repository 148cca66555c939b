"""A pipeline small enough for a test, in a subprocess as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills import AtOutput, Command, Outcome

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "threads=1",
    "teacher_steps=3",
    "samples=20",
    "dataset.limit=40",
    "dataset.batch_size=16",
    "tokenizer.training.steps=8",
    "tokenizer.training.save_every=3",
    "student.training.steps=5",
    "student.training.save_every=2",
    "cache.samples_per_shard=16",
    "dit.training.steps=8",
    "dit.training.save_every=3",
    "dit.sampling.steps=2",
    "dit.sampling.batch_size=8",
    "features=[]",
]


class Pipeline:
    """`scripts/pipeline.py` on a few images, below one folder."""

    def __init__(self, folder: Path, name: str, *arguments: str):
        self.root = folder / name
        self.arguments = ["configs/pipelines/digits.yaml", f"name={name}", f"ckpt_dir={folder}", *SMALL, *arguments]

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "scripts/pipeline.py", *self.arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self) -> str:
        """Everything it prints; fails unless it ends well."""
        process = self.start()
        output = process.communicate()[0]
        assert process.returncode == 0, output
        return output

    def run_killed(self, moments: list[AtOutput]) -> Outcome:
        """Kill it, with all its processes, at each of the moments, and start it again."""
        return Command("scripts/pipeline.py", self.arguments, environment={}).run(moments)


def table_without_speed(output: str) -> list[str]:
    """The final table's lines but for the last column, images/s."""
    lines = output[output.index("Features:") :].splitlines()
    start = [i for i, line in enumerate(lines) if line.startswith("decoder")]
    return [" ".join(line.split()[:-1]) for i in start for line in lines[i + 2 :][: lines[i + 2 :].index("")]]


@pytest.fixture
def pipeline(tmp_path):
    def make(name: str, *arguments: str) -> Pipeline:
        return Pipeline(tmp_path, name, *arguments)

    return make
