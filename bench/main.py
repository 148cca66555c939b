"""Measure speed and memory on this machine: `python scripts/bench.py tokenizer|dit|pipeline|builder|cache|scaling`.

tokenizer: our decoders or our encoder compared with diffusers' autoencoders, or a training step compared with that of
    the decoder's plain form, eager or compiled, float32 or bfloat16: `tokenizer decoder=[S,M]
    dtype=[float32,bfloat16] compile=[false,true]`.
dit: a training step of our DiT compared with diffusers' DiT of the same shape: `dit model=DiT-S/2 dtype=bfloat16
    compile=true batch=16 rounds=5`.
pipeline: sampling from class to image with f16c4 latents and our one-step decoder beside f8c4 and AutoencoderKL.
builder: a cache built from JPEG files beside the encoder alone.
cache: latents per second of the cache's reader compared with other storage formats, and how long a training step waits
    for data.
scaling: time and peak memory of one-step decodes and of local attention alone at growing sizes, in one process each.

The first four take key=value, list their keys with --help, and write their results to a file with json=FILE.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

SIDES = (256, 512, 1024)
REPEATS = 3


def main(argv: list[str] | None = None) -> int:
    """Run the measurement that is asked for."""
    from ssdd.engine.program import run_program

    return run_program(run, argv)


def run(argv: list[str]) -> int:
    """The measurement's exit status; UserError for what the user can correct."""
    if argv == ["scaling"]:
        return scaling()
    if argv == ["cache"]:
        from bench.cache import cache

        return cache()
    if argv[:1] in (["tokenizer"], ["dit"], ["pipeline"], ["builder"]):
        return getattr(importlib.import_module(f"bench.{argv[0]}"), argv[0])(argv[1:])
    if len(argv) == 2 and argv[0] == "_serve":
        from bench.processes import serve

        return serve(json.loads(argv[1]))
    if len(argv) == 3 and argv[0] == "_measure":
        print(json.dumps(measure(argv[1], int(argv[2]))))
        return 0
    print(__doc__, file=sys.stderr)
    return 0 if argv in (["-h"], ["--help"]) else 2


def scaling() -> int:
    """A table of best times, times per pixel relative to the smallest size, and peak memory."""
    from bench.processes import PROGRAM
    from ssdd.engine.tables import Column, print_head, print_row

    columns = (
        Column("what", "what", 9),
        Column("px", "side", 5, 0),
        Column("best s", "seconds", 9, 3),
        Column("ns/px", "pixel", 8, 0),
        Column("ratio", "ratio", 7, 2),
        Column("peak GiB", "peak_bytes", 9, 2, 2**-30),
    )
    print_head(columns)
    for what in ("attention", "decode"):
        first = None
        for side in SIDES:
            command = [sys.executable, str(PROGRAM), "_measure", what, str(side)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout)
            pixel = found["seconds"] / side**2 * 1e9
            first = first or pixel
            print_row(columns, found | {"what": what, "side": side, "pixel": pixel, "ratio": pixel / first})
    return 0


def measure(what: str, side: int) -> dict[str, float]:
    """Best of some runs in this process, decoder S at f8c4, one image of side x side pixels, float32."""
    import torch

    from bench.report import bench_device
    from ssdd import SSDD
    from ssdd.engine.devices import peak_memory
    from ssdd.engine.throughput import seconds_a_call
    from ssdd.model.attention import WindowGeometry

    torch.manual_seed(0)
    device = bench_device()
    model = SSDD({"name": "f8c4", "width": 64}, "S").to(device)
    grid = side // 8
    z, noise = torch.randn(1, 4, grid, grid, device=device), torch.randn(1, 3, side, side, device=device)
    block = model.decoder.mid_block.transformer_blocks[0]
    tokens = torch.randn(1, grid, grid, block.attn1.to_q.in_features, device=device)
    geometry = WindowGeometry.of(grid, grid, 8, device)

    @torch.no_grad()
    def attention() -> None:
        block.attn1(tokens, block.relative_position_bias(geometry), geometry)

    run = attention if what == "attention" else lambda: model.decode(z, steps=1, noise=noise)
    return {"seconds": seconds_a_call(device, run, REPEATS), "peak_bytes": peak_memory(device)}


if __name__ == "__main__":
    sys.exit(main())
