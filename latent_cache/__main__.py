"""`python -m latent_cache build|info|verify|stats|export|import key=value ...`"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from textwrap import indent
from typing import Any, NamedTuple

import numpy as np

from latent_cache.config import BuildConfig, InfoConfig, StatsConfig, VerifyConfig
from latent_cache.peers.export import ExportConfig
from latent_cache.peers.formats import export_help, import_help
from latent_cache.peers.importing import ImportConfig
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.files import write_json
from ssdd.engine.program import run_program
from ssdd.engine.schema_help import help_text
from ssdd.engine.tables import listed

PROGRAM = "python -m latent_cache"


class Command(NamedTuple):
    schema: type
    run: Callable[[Any], int]  # from the config to the exit status
    description: str


def commands() -> dict[str, Command]:
    """The commands by name; those that exchange caches describe the formats that there are at the moment."""
    return {
        "build": Command(
            BuildConfig, _build, "Encode images once and store their normalised latents in WebDataset shards."
        ),
        "info": Command(InfoConfig, _info, "Print what a cache holds."),
        "verify": Command(
            VerifyConfig, _verify, "Check that a cache is complete and intact; the exit status is 1 if not."
        ),
        "stats": Command(
            StatsConfig, _stats, "Diagnose the latents: channels, tails, spectrum, information, and remedies."
        ),
        "export": Command(ExportConfig, _export, export_help()),
        "import": Command(ImportConfig, _import, import_help()),
    }


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a damaged cache, 2 for a UserError."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_program(_run, argv)


def _run(argv: list[str]) -> int:
    known = commands()
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} COMMAND key=value ...\n")
        listing = listed({name: _first_sentence(command.description) for name, command in known.items()})
        print(indent(listing, "  "))
        print(f"\n`{PROGRAM} COMMAND --help` lists the keys of a command.")
        return 0 if argv else 2
    name, *arguments = argv
    if name not in known:
        raise UserError(f"unknown command {name!r}: expected one of {', '.join(known)}; --help explains them")
    schema, run, description = known[name]
    if {"-h", "--help"} & set(arguments):
        print(help_text(schema, f"{PROGRAM} {name}", description))
        return 0
    return run(parse(schema, arguments, program=f"{PROGRAM} {name}", description=description))


def _first_sentence(text: str) -> str:
    return f"{text.partition('. ')[0].removesuffix('.')}."


def _build(cfg: BuildConfig) -> int:
    if cfg.dry_run:
        return _dry_run(cfg)
    from latent_cache.write.build import build
    from ssdd.engine.processes import Processes

    manifest = build(cfg)
    Processes.join(cfg.device).print(_made(cfg.out, manifest))
    return 0


def _dry_run(cfg: BuildConfig) -> int:
    from latent_cache.write.dry_run import dry_run
    from ssdd.engine.processes import Processes

    Processes.join(cfg.device).print(dry_run(cfg))
    return 0


def _stats(cfg: StatsConfig) -> int:
    from latent_cache.diagnose import stats
    from latent_cache.diagnosis_report import table

    result = stats(cfg)
    if cfg.out is not None:
        write_json(cfg.out, result)
    print(table(result))
    return 0


def _export(cfg: ExportConfig) -> int:
    from latent_cache.peers.export import export

    print(export(cfg))
    return 0


def _import(cfg: ImportConfig) -> int:
    from latent_cache.peers.importing import import_latents

    print(_made(cfg.out, import_latents(cfg)))
    return 0


def _made(out: str, manifest: dict) -> str:
    counts = ", ".join(f"{entry['count']} {split}" for split, entry in manifest["splits"].items())
    return f"{out}: {counts} latents of shape {'x'.join(map(str, manifest['shape']))}"


def _verify(cfg: VerifyConfig) -> int:
    from latent_cache.verify import verify

    problems = verify(cfg.cache, cfg.mode)
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{cfg.cache}: {f'{len(problems)} found' if problems else 'whole'}")
    return 1 if problems else 0


def _info(cfg: InfoConfig) -> int:
    from latent_cache.read.dataset import LatentDataset

    train = LatentDataset(cfg.cache)
    manifest, norm = train.manifest, train.norm
    size = sum(shard["bytes"] for entry in manifest["splits"].values() for shard in entry["shards"])
    dataset, encoder = manifest["dataset"], manifest["tokenizer"]["encoder"]
    lines = {
        "encoder": f"{', '.join(f'{key} {value}' for key, value in encoder.items())}, "
        f"weights {manifest['tokenizer']['fingerprint'][:12]}",
        "images": f"{dataset['source']}, {dataset['im_size'] or '?'} x {dataset['im_size'] or '?'} pixels, "
        f"{dataset['crop']} crop",
        "latent": f"{' x '.join(map(str, train.latent_shape))}, {manifest['content']}, {manifest['dtype']}, "
        + ("with" if train.has_flips else "without")
        + " mirrored views",
        "raw mean": " ".join(f"{value:.4g}" for value in norm.mean.tolist()) + f"  (all: {norm.z_mean:.4g})",
        "raw deviation": " ".join(f"{value:.4g}" for value in norm.std.tolist()) + f"  (all: {norm.z_std:.4g})",
        "size": f"{size / 1e6:.1f} MB",
        **{
            split: f"{entry['count']} samples in {len(entry['shards'])} shards"
            + (f", {len(entry['skipped'])} unreadable images skipped" if entry["skipped"] else "")
            for split, entry in manifest["splits"].items()
        },
    }
    counts = np.bincount(train.labels, minlength=train.num_classes)
    lines["classes"] = f"{train.num_classes}, {counts.min()} to {counts.max()} training samples each"
    print(listed(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
