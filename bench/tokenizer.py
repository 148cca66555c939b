"""Tokenizers compared with diffusers' autoencoders: `python scripts/bench.py tokenizer key=value`.

Every network has random weights. Parameters are those of the half that runs. GFLOP are of one image as it is computed;
"of peak" holds the best rate against the best that a matrix product or a convolution reached in the same run. "/ KL" is
the network's rate by that of AutoencoderKL, the median over rounds. Peak memory is the process's, on CUDA the device's.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.ceilings import measure_ceilings
from bench.networks import LATENTS, OURS, PEERS
from bench.processes import measure_in_turn
from bench.report import GFLOP, LAYOUT, MEMORY, NETWORK, PARAMETERS, RATE, SECONDS, Report, rates, ratio
from bench.settings import Forms, check_lists, check_positive, form
from bench.tokenizer_job import PLAIN, TokenizerJob
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.tables import Column
from ssdd.model.decoder_families import UVIT, decoder_names, parse_decoder
from ssdd.model.encoder import parse_encoder_name

TASKS = ("decode", "encode", "train")


@dataclass
class TokenizerSettings(Forms):
    """Images per second of our tokenizer and of others on the same machine, in turn, each in its own process."""

    task: str = field(default="decode", metadata={"choices": TASKS})
    """decode: latents to images. encode: images to posteriors; one encoder, whatever the decoders. train: a step of
    flow matching alone, with backward pass and optimizer, compared with the plain form of the same decoder (no
    peers)."""
    decoder: list[str] = field(default_factory=lambda: ["S", "M"], metadata={"choices": decoder_names})
    """Decoder sizes; task=train has those of the U-ViT."""
    encoder: str = "f8c4"
    """Stride and channels of our latents."""
    peers: list[str] = field(default_factory=lambda: list(PEERS), metadata={"choices": tuple(PEERS)})
    """Networks of diffusers, each measured contiguous and channels_last; ratios are to the better."""
    side: list[int] = field(default_factory=lambda: [256])
    """Pixels of the image's sides."""
    batch: list[int] = field(default_factory=lambda: [1])
    """Images per batch."""
    steps: list[int] = field(default_factory=lambda: [1])
    """Steps of our decoders in task=decode, one row each."""


def tokenizer(argv: list[str]) -> int:
    """A table for each combination of side, dtype, compile and batch, then all of it as one line of JSON."""
    settings = parse(TokenizerSettings, argv, program="bench tokenizer", description=__doc__)
    check(settings)
    report = Report("tokenizer", settings, argv, f"Tokenizers, task {settings.task}, {settings.rounds} rounds in turn")
    ceilings = measure_ceilings(report.device, settings.dtype)
    report.record(ceilings=ceilings)
    axes = (settings.side, settings.dtype, settings.compile, settings.batch)
    for side, dtype, compiled, batch in itertools.product(*axes):
        print(f"\n{settings.task}, {dtype}, {form(compiled)}, {side} px, batch {batch}")
        conditions = {"task": settings.task, "encoder": settings.encoder}
        conditions |= {"side": side, "dtype": dtype, "compile": compiled, "batch": batch}
        for networks in compared(settings):
            jobs = [TokenizerJob(name, last, steps=steps, **conditions) for name, last, steps in networks]
            rows = measure(jobs, settings.rounds, max(ceilings[dtype].values()))
            report.begin(columns_of(rows))
            report.add(rows)
    report.end()
    return 0


def check(settings: TokenizerSettings) -> None:
    """UserError for settings that nothing can be measured with."""
    check_positive(settings, "side", "batch", "steps", "rounds")
    check_lists(settings, "decoder", "dtype", "compile")
    try:
        stride, channels = parse_encoder_name(settings.encoder)
    except ValueError as error:
        raise UserError(str(error)) from None
    peers = settings.peers if settings.task != "train" else []
    if settings.task == "train" and (others := [name for name in settings.decoder if name not in UVIT.sizes]):
        raise UserError(f"decoder={others}: task=train has the plain form of the U-ViT alone: {', '.join(UVIT.sizes)}")
    with torch.device("meta"):
        decoders = [family.build(size, stride, channels) for family, size in map(parse_decoder, settings.decoder)]
    ours = [decoder.pixel_multiple for decoder in decoders]
    multiple = math.lcm(stride, *ours, *(LATENTS[peer][0] for peer in peers))
    if bad := [side for side in settings.side if side % multiple]:
        raise UserError(f"side={bad}: encoder={settings.encoder} and the peers need multiples of {multiple}")


def compared(settings: TokenizerSettings) -> list[list[tuple[str, bool, int]]]:
    """Groups of networks that are measured in turn: name, whether in channels_last, and steps; ours first."""
    if settings.task == "train":
        return [[(OURS + size, True, 1), (PLAIN + size, False, 1)] for size in settings.decoder]
    peers = [(peer, last, 1) for peer in settings.peers for last in (False, True)]
    if settings.task == "encode":
        return [[(OURS + settings.encoder, True, 1), *peers]]
    return [[*((OURS + size, True, steps) for size in settings.decoder for steps in settings.steps), *peers]]


def measure(jobs: list[TokenizerJob], rounds: int, peak: float) -> list[dict[str, Any]]:
    """A row for each job. `ratios`: to each peer, in the memory format in which its median is better."""
    rows = []
    for job, found in zip(jobs, measure_in_turn([asdict(job) for job in jobs], rounds), strict=True):
        row = {"network": job.network, "layout": job.layout}
        row |= {key: getattr(job, key) for key in ("task", "steps", "side", "dtype", "compile", "batch")}
        row |= {"parameters": found["parameters"], "gflop": found["flop"] / 1e9}
        row |= rates(found["stages"][job.task], job.batch) | {"peak_memory_bytes": found["peak_memory_bytes"]}
        row["share_of_peak"] = job.batch / row["min"] * found["flop"] / peak  # both are the best that was seen
        rows.append(row)
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not row["network"].startswith(OURS):
            best[row["network"]] = min(best.get(row["network"], row), row, key=lambda one: one["median"])
    for row in rows:
        row["ratios"] = {name: ratio(peer["seconds"], row["seconds"]) for name, peer in best.items()}
    return rows


def columns_of(rows: list[dict[str, Any]]) -> list[Column]:
    """The table's columns, a ratio to each peer at the end."""
    steps = Column("steps", "steps", 5, 0)
    share = Column("of peak %", "share_of_peak", 9, 1, 100)
    ratios = [Column(f"/ {name.removeprefix('Autoencoder')}", name, 8, 3) for name in rows[0]["ratios"]]
    return [NETWORK, LAYOUT, steps, PARAMETERS, GFLOP, RATE, *SECONDS, MEMORY, share, *ratios]
