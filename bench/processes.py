"""Networks measured in turn, each in its own process: its peak memory is its own, and other load affects all equally.

A child gets its job as JSON, prepares it and writes one line of JSON about it. Then, for every line it reads, it works
once and replies with the seconds of each stage and its peak memory. Children start side by side, but never work so.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.report import bench_device
from ssdd.engine.devices import peak_memory, synchronize
from ssdd.engine.errors import UserError

PROGRAM = Path(__file__).resolve().parents[1] / "scripts" / "bench.py"
CUDA_SECONDS = 0.2  # at least, of calls without a pause
WARM_UP = 2  # times, one child after another: kernels are compiled and chosen, an optimizer's state is made


@dataclass
class Work:
    """What a child measures: stages that run one after another, each timed by itself."""

    stages: dict[str, Callable[[], object]]
    parameters: int
    flop: int
    """Of one image as it is computed, two per multiply-add: matrix products, convolutions and attentions."""


def measure_in_turn(jobs: Sequence[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Of each job `parameters`, `flop`, `peak_memory_bytes`, and `stages`: its stages' seconds, one per round.

    job["module"] names the module of bench/ whose `prepare(job, device)` makes the Work. UserError as raised there,
    or where a process ended.
    """
    with ExitStack() as stack:
        children = [stack.enter_context(Child(job)) for job in jobs]
        found = [child.answer() | {"stages": {}} for child in children]
        for child in children:
            for _ in range(WARM_UP):
                child.work()
        for _ in range(rounds):
            for child, result in zip(children, found, strict=True):
                worked = child.work()
                peaks = result.get("peak_memory_bytes", 0), worked["peak_memory_bytes"]
                result["peak_memory_bytes"] = max(peaks)
                for stage, seconds in worked["stages"].items():
                    result["stages"].setdefault(stage, []).append(seconds)
        return found


class Child:
    """The process of one job."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        command = [sys.executable, str(PROGRAM), "_serve", json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def work(self) -> dict[str, Any]:
        """Once: `stages`, seconds of each, and `peak_memory_bytes`."""
        with suppress(BrokenPipeError):  # then the reply is missing, too
            print(file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next one. UserError where the child reports one, or has ended."""
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the process of {self.job} ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer


def serve(job: dict[str, Any]) -> int:
    """The child's side, until its input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not a reply
    device = bench_device()

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        work = importlib.import_module(f"bench.{job['module']}").prepare(job, device)
    except UserError as error:
        answer({"error": str(error)})
        return 2
    answer({"parameters": work.parameters, "flop": work.flop})
    for _ in sys.stdin:
        _forget_peak(device)
        answer({"stages": _seconds(work, device), "peak_memory_bytes": peak_memory(device)})
    return 0


def _forget_peak(device: torch.device) -> None:
    """Let `peak_memory` be of what follows, not of weights that were made in float32 or of compilers."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # elsewhere than on Linux the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _seconds(work: Work, device: torch.device) -> dict[str, float]:
    """Of one call of each stage; on CUDA the mean of many, after one that wakes the device, which others used."""
    found = {}
    for stage, run in work.stages.items():
        if device.type == "cuda":
            run()
        synchronize(device)
        began, calls = time.perf_counter(), 0
        while calls == 0 or (device.type == "cuda" and time.perf_counter() - began < CUDA_SECONDS):
            run()
            calls += 1
        synchronize(device)
        found[stage] = (time.perf_counter() - began) / calls
    return found
