"""What the benchmarks' children do, done here."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from bench import dit as bench_dit
from bench import pipeline as bench_pipeline
from bench import processes as bench_processes
from bench import tokenizer as bench_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def in_process(monkeypatch):
    """Children's work done here, one job after another: importing torch and diffusers anew takes seconds."""

    def measure(jobs, rounds):
        found = []
        for job in jobs:
            module = importlib.import_module(f"bench.{job['module']}")
            work: bench_processes.Work = module.prepare(json.loads(json.dumps(job)), CPU)
            times = [bench_processes._seconds(work, CPU) for _ in range(rounds)]
            stages = {stage: [one[stage] for one in times] for stage in work.stages}
            found.append({"parameters": work.parameters, "flop": work.flop, "stages": stages, "peak_memory_bytes": 1})
        return found

    for bench in (bench_tokenizer, bench_pipeline, bench_dit):
        monkeypatch.setattr(bench, "measure_in_turn", measure)
    found = {"matmul": 1e11, "conv": 2e11, "thin_conv": 1e11}
    monkeypatch.setattr(bench_tokenizer, "measure_ceilings", lambda device, dtypes: dict.fromkeys(dtypes, found))
