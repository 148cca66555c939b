"""The layouts of other repositories that a cache is exported to and imported from: one table."""

from __future__ import annotations

from collections.abc import Iterable

from latent_cache.peers import fast_dit, lightningdit, mar, repa
from latent_cache.peers.exchange import PeerFormat

FORMATS: dict[str, PeerFormat] = {
    "fast-dit": fast_dit.FORMAT,
    "lightningdit": lightningdit.FORMAT,
    "repa": repa.FORMAT,
    "mar": mar.FORMAT,
}


def readable() -> list[str]:
    """The formats that `import` reads."""
    return [name for name, layout in FORMATS.items() if layout.open is not None]


def export_help() -> str:
    """What the command `export` does, and what each format holds."""
    formats = [
        f"{name}: {layout.holds} ({', '.join(f'{key}=' for key in layout.keys)})" for name, layout in FORMATS.items()
    ]
    return f"Write a cache in the layout of {_projects(FORMATS)}. Formats and their own keys: {'; '.join(formats)}."


def import_help() -> str:
    """What the command `import` does, and which formats scale their values."""
    scaled = {name: FORMATS[name].scaling_factor for name in readable() if FORMATS[name].scaling_factor != 1}
    factors = ", ".join(f"{factor:g} for {name}" for name, factor in scaled.items())
    return f"Make a cache from one of {_projects(readable())}. The default of scaling_factor is {factors}, else 1."


def _projects(names: Iterable[str]) -> str:
    *others, last = (FORMATS[name].project for name in names)
    return f"{', '.join(others)} or {last}"
