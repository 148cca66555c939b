"""What the benchmarks print: the machine, tables of figures, and the same as one line of JSON."""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ssdd.engine.errors import UserError
from ssdd.engine.files import plain, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Column:
    """A figure of every row: `row[key]` times `scale`, "-" where it is None; text where `decimals` is None."""

    title: str
    key: str
    width: int
    decimals: int | None = None
    scale: float = 1.0

    def head(self) -> str:
        return f"{self.title:<{self.width}}" if self.decimals is None else f"{self.title:>{self.width}}"

    def cell(self, row: dict[str, Any]) -> str:
        value = row[self.key]
        if value is None:
            return f"{'-':>{self.width}}"
        if self.decimals is None:
            return f"{value:<{self.width}}"
        return f"{self.scale * value:{self.width}.{self.decimals}f}"


NETWORK = Column("network", "network", 15)
LAYOUT = Column("layout", "layout", 13)
PARAMETERS = Column("params M", "parameters", 9, 2, 1e-6)
RATE = Column("images/s", "images_per_s", 9, 2)
SECONDS = (Column("median s", "median", 9, 4), Column("min", "min", 9, 4), Column("max", "max", 9, 4))
MEMORY = Column("peak GiB", "peak_memory_bytes", 9, 2, 2**-30)


def print_head(columns: Sequence[Column]) -> None:
    """The titles."""
    print(" ".join(column.head() for column in columns).rstrip(), flush=True)


def print_row(columns: Sequence[Column], row: dict[str, Any]) -> None:
    """One line of figures."""
    print(" ".join(column.cell(row) for column in columns).rstrip(), flush=True)


def rates(seconds: Sequence[float], images: int) -> dict[str, Any]:
    """Figures of rounds that took so many seconds for so many images each."""
    median = statistics.median(seconds)
    found = {"median": median, "min": min(seconds), "max": max(seconds), "images_per_s": images / median}
    return {"seconds": list(seconds), **found}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast we are: the median over rounds, which other load on the machine affects both equally."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def form(compiled: bool) -> str:
    """How a table shows whether torch.compile is on."""
    return "compiled" if compiled else "eager"


def bench_device() -> torch.device:
    """CUDA where it is, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """What figures of a run depend on besides its settings."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = torch.get_num_threads()
    found = {"device": device.type, "place": place, "threads": threads, "torch": torch.__version__}
    return found | {"float32_matmul_precision": torch.get_float32_matmul_precision()}  # "high" is TF32 on CUDA


def print_machine(device: torch.device) -> None:
    """The line below a benchmark's title."""
    found = machine(device)
    print(f"torch {found['torch']}, {found['device']}, {found['place']}, {found['threads']} threads")


def _processor() -> str:
    """The CPU's name as recorded by Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def check_positive(settings: Any, *names: str) -> None:
    """UserError unless each of these settings is at least 1, or a list of such numbers that is not empty."""
    for name in names:
        value = getattr(settings, name)
        if not value or min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"{name}={value}: must be at least 1")


def check_lists(settings: Any, *names: str) -> None:
    """UserError where one of these lists is empty: there would be nothing to measure."""
    for name in names:
        if not getattr(settings, name):
            raise UserError(f"{name}=[]: name at least one")


class Results:
    """The JSON of one benchmark; its file, where the setting `json` names one, is kept up to date as rows come in."""

    def __init__(self, what: str, settings: Any, device: torch.device, argv: Sequence[str], **found: Any) -> None:
        self.file = settings.json
        self.content: dict[str, Any] = {
            "command": f"python scripts/bench.py {what} {shlex.join(argv)}".rstrip(),
            "date": time.strftime("%Y-%m-%d"),
            **machine(device),
            "settings": {key: value for key, value in asdict(settings).items() if key != "json"},
            **found,
            "rows": [],
        }

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows that are measured; a run that is stopped later keeps them."""
        self.content["rows"] += rows
        if self.file:
            write_json(self.file, self.content)

    def print(self) -> None:
        """All of it on one line."""
        print(json.dumps(plain(self.content)))
