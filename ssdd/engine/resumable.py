"""Work that survives a kill: a record of what it is for, and samples in chunks that are files once they are done."""

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


class WorkRecord:
    """A JSON file with the `request` that some work is for, a dict of JSON values, and what is known of the work.

    Written first, it says to which request the unfinished work belongs that is there; written last, that all is there.
    """

    def __init__(self, path: Path, request: dict[str, Any]):
        self.path, self.request = path, plain(request)

    def found(self) -> dict[str, Any] | None:
        """The record that is there, whatever its request."""
        return read_json(self.path) if self.path.is_file() else None

    def read(self) -> dict[str, Any] | None:
        """The record that is there, if it is of this request."""
        found = self.found()
        same = found is not None and all(found.get(key) == value for key, value in self.request.items())
        return found if same else None

    def write(self, **known: Any) -> None:
        """Record the request, and what is known of the work on it."""
        write_json(self.path, self.request | known)

    def begin(self, *folders: Path) -> dict[str, Any]:
        """The record; a new one if there is none of this request, after deleting `folders`, which hold other work.

        For the main process, before the others start.
        """
        if (found := self.read()) is not None:
            return found
        self.path.unlink(missing_ok=True)  # first: work that is deleted in part must not be found by its own request
        for folder in folders:
            if folder.exists():
                shutil.rmtree(folder)
        self.write()
        return self.request


class Chunks:
    """A folder with one safetensors file per chunk of `size` samples, all made for the same `request` (JSON values).

    Chunks are fixed by sample index, and one that is done stays, so that a kill costs one chunk.
    """

    def __init__(self, folder: Path, request: dict[str, Any], count: int, size: int):
        self.folder, self.count, self.size = folder, count, min(size, count)
        self.record = WorkRecord(folder / "request.json", {"request": request})

    @property
    def ranges(self) -> list[range]:
        """The sample indices of every chunk; the last one may be shorter."""
        return [range(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size)]

    def prepare(self) -> None:
        """Keep chunks of the same request, drop those of another one. For the main process, before the others start."""
        self.record.begin(self.folder)
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
