"""Tables as text: aligned for a terminal, or Markdown; rows at once, or one by one as they are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "-"


def fixed(value: float | None, digits: int) -> str:
    """With so many decimals; "-" where there is none."""
    return MISSING if value is None else f"{value:.{digits}f}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, named: bool = False, ruled: bool = False) -> str:
    """Columns flush right, two spaces apart. named: the first one, of names, is flush left. ruled: a line below the
    header.
    """
    widths, left = _widths([header, *rows]), [named, *[False] * (len(header) - 1)]
    first, *others = ("  ".join(map(_flush, row, widths, left)) for row in (header, *rows))
    return "\n".join([first, *["-" * len(first)] * ruled, *others])


def listed(facts: Mapping[str, str]) -> str:
    """A line for each fact: its name, and what is to say about it, flush left."""
    (width,) = _widths([[name] for name in facts])
    return "\n".join(f"{_flush(name, width, left=True)}  {fact}" for name, fact in facts.items())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


@dataclass(frozen=True)
class Column:
    """A figure of every row: `row[key]` times `scale`, "-" where it is None; text where `decimals` is None.

    width: characters, so that rows can be printed before the last one is known.
    """

    title: str
    key: str
    width: int
    decimals: int | None = None
    scale: float = 1.0

    def cell(self, row: Mapping[str, Any]) -> str:
        value = row[self.key]
        if value is None:
            return _flush(MISSING, self.width)
        if self.decimals is None:
            return _flush(value, self.width, left=True)
        return _flush(fixed(self.scale * value, self.decimals), self.width)


def print_head(columns: Sequence[Column]) -> None:
    """The titles."""
    _print(_flush(column.title, column.width, left=column.decimals is None) for column in columns)


def print_row(columns: Sequence[Column], row: Mapping[str, Any]) -> None:
    """One line of figures."""
    _print(column.cell(row) for column in columns)


def _print(cells: Iterable[str]) -> None:
    print(" ".join(cells).rstrip(), flush=True)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _flush(cell: str, width: int, left: bool = False) -> str:
    return cell.ljust(width) if left else cell.rjust(width)
