"""`python -m latent_cache build|info|verify key=value ...`"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np

from latent_cache.config import BuildConfig, InfoConfig, VerifyConfig
from ssdd.engine.config import help_text, parse
from ssdd.engine.errors import UserError

COMMANDS = {
    "build": (BuildConfig, "Encode images once and store their normalised latents in WebDataset shards."),
    "info": (InfoConfig, "Print what a cache holds."),
    "verify": (VerifyConfig, "Check that a cache is whole; the exit status is 1 if it is not."),
}
PROGRAM = "python -m latent_cache"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a damaged cache, 2 for a UserError."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _run(argv)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} COMMAND key=value ...\n")
        print("\n".join(f"  {name:<8}{description}" for name, (_, description) in COMMANDS.items()))
        print(f"\n`{PROGRAM} COMMAND --help` lists the keys of a command.")
        return 0 if argv else 2
    command, *arguments = argv
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}: expected one of {', '.join(COMMANDS)}; --help explains them")
    schema, description = COMMANDS[command]
    if {"-h", "--help"} & set(arguments):
        print(help_text(schema, f"{PROGRAM} {command}", description))
        return 0
    program = "latent_cache" if command == "build" else f"latent_cache_{command}"
    cfg = parse(schema, arguments, program=program, description=description)
    if command == "build":
        return _build(cfg)
    if command == "info":
        print(_info(Path(cfg.cache)))
        return 0
    return _verify(cfg)


def _build(cfg: BuildConfig) -> int:
    from latent_cache.build import build
    from latent_cache.processes import leave

    try:
        manifest = build(cfg)
    finally:
        first = leave() == 0
    if first:
        counts = ", ".join(f"{entry['count']} {split}" for split, entry in manifest["splits"].items())
        print(f"{cfg.out}: {counts} latents of shape {'x'.join(map(str, manifest['shape']))}")
    return 0


def _verify(cfg: VerifyConfig) -> int:
    from latent_cache.verify import verify

    problems = verify(cfg.cache, cfg.mode)
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{cfg.cache}: {f'{len(problems)} found' if problems else 'whole'}")
    return 1 if problems else 0


def _info(folder: Path) -> str:
    from latent_cache.dataset import LatentDataset

    train = LatentDataset(folder)
    manifest, norm = train.manifest, train.norm
    size = sum(shard["bytes"] for entry in manifest["splits"].values() for shard in entry["shards"])
    dataset, encoder = manifest["dataset"], manifest["tokenizer"]["encoder"]
    lines = {
        "encoder": f"{encoder['name']}, width {encoder['width']}, weights {manifest['tokenizer']['fingerprint'][:12]}",
        "images": f"{dataset['source']}, {dataset['im_size']} x {dataset['im_size']} pixels, {dataset['crop']} crop",
        "latent": f"{' x '.join(map(str, train.latent_shape))}, {manifest['content']}, {manifest['dtype']}, "
        + ("with" if train.has_flips else "without")
        + " mirrored views",
        "raw mean": " ".join(f"{value:.4g}" for value in norm.mean.tolist()) + f"  (all: {norm.z_mean:.4g})",
        "raw deviation": " ".join(f"{value:.4g}" for value in norm.std.tolist()) + f"  (all: {norm.z_std:.4g})",
        "size": f"{size / 1e6:.1f} MB",
        **{
            split: f"{entry['count']} samples in {len(entry['shards'])} shards"
            + (f", {len(entry['skipped'])} unreadable images left out" if entry["skipped"] else "")
            for split, entry in manifest["splits"].items()
        },
    }
    counts = np.bincount(train.labels, minlength=train.num_classes)
    lines["classes"] = f"{train.num_classes}, {counts.min()} to {counts.max()} training samples each"
    return "\n".join(f"{name:<14} {value}" for name, value in lines.items())


if __name__ == "__main__":
    sys.exit(main())
