"""The shard: a plain WebDataset tar whose samples all have the same size, so that it is also an array of records.

A sample is the members `{index:09d}.npy` (float16 [K, h, w]), `{index:09d}.cls` (the label in ASCII) and, with stored
flips, `{index:09d}.flip.npy`, in this order. Owner, mode and time are fixed, so the bytes depend on the data alone.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ssdd.engine.errors import UserError
from ssdd.engine.file_kinds import check_regular
from ssdd.engine.files import sha256_file

BLOCK = tarfile.BLOCKSIZE  # 512: a tar is made of such blocks
DTYPE = "<f2"
LABEL_BYTES = 20  # as many as an int64 may need
WRITTEN_ROWS = 1024  # rows that are put together in memory at a time


def shard_name(number: int) -> str:
    """Shard number 3 -> "000003", without suffix."""
    return f"{number:06d}"


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


@dataclass(frozen=True)
class ShardLayout:
    """Where things lie in a shard of rows [K, h, w] (`shape`), with or without a mirrored view."""

    shape: tuple[int, ...]
    flip: bool = False

    @property
    def views(self) -> tuple[str, ...]:
        """Extensions of the members that hold latents."""
        return ("npy", "flip.npy") if self.flip else ("npy",)

    @property
    def row_bytes(self) -> int:
        """Size of the values of one row."""
        return self.record["npy"].itemsize

    def row_starts(self, places: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Where the values of samples number `places` of a shard begin, in the views number `views`: int64 [n]."""
        offsets = np.array([self.record.fields[extension][1] for extension in self.views])
        return places * self.record.itemsize + offsets[views]

    @cached_property
    def npy_header(self) -> bytes:
        """What a .npy file of one row begins with."""
        file = io.BytesIO()
        header = {"descr": DTYPE, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue()

    @cached_property
    def record(self) -> np.dtype:
        """One sample, tar headers included: fields `<ext>:tar`, `<ext>:npy` (headers) and `<ext>` for each member."""
        values = int(np.prod(self.shape))
        names, formats, offsets, at = [], [], [], 0
        for extension in ("npy", "cls", "flip.npy")[: 3 if self.flip else 2]:
            fields = [(f"{extension}:tar", f"V{BLOCK}", BLOCK)]
            if extension == "cls":
                fields.append((extension, f"S{LABEL_BYTES}", LABEL_BYTES))
            else:
                header_bytes = len(self.npy_header)
                fields.append((f"{extension}:npy", f"V{header_bytes}", header_bytes))
                fields.append((extension, (DTYPE, values), values * np.dtype(DTYPE).itemsize))
            for name, kind, size in fields:
                names.append(name)
                formats.append(kind)
                offsets.append(at)
                at += size
            at = _blocks(at)
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": at})

    def file_bytes(self, count: int) -> int:
        """Size of a shard of `count` samples: the samples, two empty blocks, padding to a tar record."""
        size = count * self.record.itemsize + 2 * BLOCK
        return -(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def tar_header(self, index: int, extension: str, size: int) -> bytes:
        """Header of member `{index:09d}.{extension}` with `size` bytes."""
        member = tarfile.TarInfo(f"{index:09d}.{extension}")
        member.size, member.mode, member.mtime = size, 0o644, 0
        return member.tobuf(tarfile.USTAR_FORMAT)

    def records(self, first: int, views: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Samples first, first + 1, ... as `record`s; views: [n, view, K, h, w] in any dtype, labels: int64 [n]."""
        records = np.zeros(len(labels), self.record)
        records["cls"] = labels.astype(f"S{LABEL_BYTES}")
        sizes = np.char.str_len(records["cls"])
        records["cls:tar"] = [np.void(self.tar_header(first + row, "cls", int(size))) for row, size in enumerate(sizes)]
        member_bytes = len(self.npy_header) + self.row_bytes
        for number, extension in enumerate(self.views):
            records[extension] = views[:, number].reshape(len(labels), -1)
            records[f"{extension}:npy"] = np.void(self.npy_header)
            records[f"{extension}:tar"] = [
                np.void(self.tar_header(first + row, extension, member_bytes)) for row in range(len(labels))
            ]
        return records


def write_shard(path: Path, layout: ShardLayout, first: int, views: np.ndarray, labels: np.ndarray) -> dict:
    """Write the shard of samples first, first + 1, ...; views: [n, view, K, h, w]; labels: int64 [n].

    Returns its sidecar: {"count", "bytes", "sha256"}.
    """
    count = len(labels)
    with open(path, "wb") as file:
        for start in range(0, count, WRITTEN_ROWS):
            rows = slice(start, start + WRITTEN_ROWS)
            file.write(layout.records(first + start, views[rows], labels[rows]).tobytes())
        file.write(bytes(layout.file_bytes(count) - file.tell()))
    return {"count": count, "bytes": layout.file_bytes(count), "sha256": sha256_file(path)}


class Shard:
    """A shard mapped into memory: `views[view][number]` is a stored row, `memory` all bytes of the file.

    UserError when the file has another size, or does not begin and end with samples samples[0] and samples[-1] of
    this layout.
    """

    def __init__(self, path: Path, layout: ShardLayout, samples: range) -> None:
        self.path, self.layout, self.samples = path, layout, samples
        check_regular(path)
        size = path.stat().st_size if path.is_file() else None
        expected = layout.file_bytes(len(samples))
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes instead of {expected}"
            raise UserError(f"{path} {found}: copy it again from an intact one, or build the cache again")
        mapped = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        self.memory = memoryview(mapped)
        self.records = mapped[: len(samples) * layout.record.itemsize].view(layout.record)
        self.views = [self.records[extension] for extension in layout.views]  # float16 [n, K h w] each
        for row in {0, len(samples) - 1}:
            self._check_headers(row)

    def _check_headers(self, row: int) -> None:
        record, layout = self.records[row], self.layout
        member_bytes = len(layout.npy_header) + layout.row_bytes
        expected = {"cls:tar": layout.tar_header(self.samples[row], "cls", len(record["cls"]))}
        for extension in layout.views:
            expected[f"{extension}:tar"] = layout.tar_header(self.samples[row], extension, member_bytes)
            expected[f"{extension}:npy"] = layout.npy_header
        for name, header in expected.items():
            if record[name].tobytes() != header:
                raise UserError(
                    f"{self.path}: sample {self.samples[row]} does not match the manifest (header {name}): the file "
                    "is damaged or belongs to another cache; run `python -m latent_cache verify`"
                )

    def rows(self, numbers: np.ndarray, view: str = "npy") -> np.ndarray:
        """Latents number `numbers` of this shard, in the view with this extension: float16 [n, K, h, w]."""
        return self.records[view][numbers].reshape(len(numbers), *self.layout.shape)

    def labels(self, numbers: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Class labels of samples number `numbers` of this shard: int64 [n]. UserError for one that is not a number."""
        try:
            return self.records["cls"][numbers].astype(np.int64)
        except ValueError as problem:
            raise UserError(
                f"{self.path}: a label is not a whole number ({problem}): the file is damaged; run "
                "`python -m latent_cache verify`"
            ) from None
