"""Work on n samples in chunks fixed by sample index; a chunk that is done is a file, so that a kill costs one chunk."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ssdd.engine.checkpoint import load_tensors, save_tensors
from ssdd.engine.files import plain, read_json, remove_leftovers, write_json


class Chunks:
    """A folder with one safetensors file per chunk of `size` samples, all made for the same `request` (JSON values)."""

    def __init__(self, folder: Path, request: dict[str, Any], count: int, size: int):
        self.folder, self.request, self.count = folder, plain(request), count
        self.size = min(size, count)

    @property
    def ranges(self) -> list[range]:
        """The sample indices of every chunk; the last one may be shorter."""
        return [range(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size)]

    def prepare(self) -> None:
        """Keep chunks of the same request, drop those of another one. For the main process, before the others start."""
        described = self.folder / "request.json"
        if self.folder.exists() and (not described.exists() or read_json(described) != self.request):
            shutil.rmtree(self.folder)
        write_json(described, self.request)
        remove_leftovers(self.folder)

    def missing(self, rank: int = 0, world: int = 1) -> Iterator[range]:
        """The chunks that process `rank` of `world` has still to make."""
        return (indices for indices in self.ranges[rank::world] if not self._file(indices).exists())

    def save(self, indices: range, tensors: dict[str, Tensor], seconds: float) -> None:
        """Keep a chunk; seconds: what the work on it took."""
        save_tensors(self._file(indices), tensors, {"samples_per_s": repr(len(indices) / seconds)})

    def load(self, indices: range) -> dict[str, Tensor]:
        return load_tensors(self._file(indices))

    def samples_per_s(self) -> float:
        """Of one process: the median chunk, so that the first one, which chooses kernels or compiles, counts little."""
        rates = []
        for indices in self.ranges:
            with safe_open(self._file(indices), framework="pt") as file:
                rates.append(float(file.metadata()["samples_per_s"]))
        return statistics.median(rates)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, indices: range) -> Path:
        return self.folder / f"{indices.start:09d}.safetensors"
