"""What the benchmarks report: the machine, tables of figures, and the same as one line of JSON."""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench.settings import Rounds
from ssdd.engine.files import plain, write_json
from ssdd.engine.provenance import processor
from ssdd.engine.tables import Column, print_head, print_row

NETWORK = Column("network", "network", 15)
LAYOUT = Column("layout", "layout", 13)
PARAMETERS = Column("params M", "parameters", 9, 2, 1e-6)
GFLOP = Column("GFLOP/image", "gflop", 11, 1)
RATE = Column("images/s", "images_per_s", 9, 2)
SECONDS = (Column("median s", "median", 9, 4), Column("min", "min", 9, 4), Column("max", "max", 9, 4))
MEMORY = Column("peak GiB", "peak_memory_bytes", 9, 2, 2**-30)


def bench_device() -> torch.device:
    """CUDA where it is, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rates(seconds: Sequence[float], images: int) -> dict[str, Any]:
    """Figures of rounds that took so many seconds for so many images each."""
    median = statistics.median(seconds)
    found = {"median": median, "min": min(seconds), "max": max(seconds), "images_per_s": images / median}
    return {"seconds": list(seconds), **found}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast we are: the median over rounds, which other load on the machine affects both equally."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


class Report:
    """Of one benchmark, printed as it runs; its file, where the setting `json` names one, is kept up to date.

    what, argv: the command. title: printed above the line that describes the machine.
    """

    def __init__(self, what: str, settings: Rounds, argv: Sequence[str], title: str) -> None:
        self.device, self.file, self.columns = bench_device(), settings.json, ()
        machine = _machine(self.device)
        described = ", ".join(str(machine[key]) for key in ("torch", "device", "place", "threads"))
        print(f"{title}\ntorch {described} threads")
        self.content: dict[str, Any] = {
            "command": f"python scripts/bench.py {what} {shlex.join(argv)}".rstrip(),
            "date": time.strftime("%Y-%m-%d"),
            **machine,
            "settings": {key: value for key, value in asdict(settings).items() if key != "json"},
            "rows": [],
        }

    def record(self, **found: Any) -> None:
        """Figures beside the rows."""
        self.content |= found

    def begin(self, columns: Sequence[Column]) -> None:
        """A table, of the rows that come next."""
        self.columns = columns
        print_head(columns)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows that are measured; a run that is stopped later keeps them. Each may have `ratios`, by column."""
        for row in rows:
            print_row(self.columns, row | row.get("ratios", {}))
        self.content["rows"] += rows
        if self.file:
            write_json(self.file, self.content)

    def end(self) -> None:
        """All of it on one line."""
        print(json.dumps(plain(self.content)))


def _machine(device: torch.device) -> dict[str, Any]:
    """What figures of a run depend on besides its settings."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    threads = torch.get_num_threads()
    found = {"device": device.type, "place": place, "threads": threads, "torch": torch.__version__}
    return found | {"float32_matmul_precision": torch.get_float32_matmul_precision()}  # "high" is TF32 on CUDA
