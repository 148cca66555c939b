"""The result of an evaluation as text. A Frechet distance is called FID on Inception's features only."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """All tables of a result of task=evaluate."""
    parts = []
    for network in result["features"]:
        parts.append(_quality(result, network))
        if network in result.get("gap", {}):
            parts.append(_gap(result["gap"][network], network))
        if network in result.get("latent_noise", {}):
            parts.append(_noise(result["latent_noise"][network], network))
        if "sweep" in result:
            parts.append(_sweep(result["sweep"], network))
    parts += [f"note: {note}" for note in result["notes"]]
    return "\n\n".join(parts)


def _quality(result: dict[str, Any], network: str) -> str:
    letters = _distance(network)
    header = [
        "decoder", f"g{letters}", "floor", f"s{letters}", "IS", "KID [95 %]", "precision", "recall", "copies (reals)",
        "decode/s", "total/s", "decoder's share",
    ]  # fmt: skip
    floor = result["floor"].get(network, {})
    rows = []
    for row in result["rows"]:
        d = row["distances"][network]
        kid = f"{d['kid']:.4f} [{d['kid_low']:.4f}, {d['kid_high']:.4f}]" if "kid" in d else "-"
        copies = f"{_number(d.get('copy_rate'), 3)} ({_number(d.get('copy_rate_held_out'), 3)})"
        rows.append(
            [
                row["name"], _number(d["frechet"], 3), _number(floor.get("frechet"), 3),
                _number(d.get("spatial_frechet"), 3), _number(d.get("inception_score"), 2), kid,
                _number(d.get("precision"), 3), _number(d.get("recall"), 3), copies,
                _number(row.get("images_per_s"), 1), _number(row.get("sampling_images_per_s"), 1),
                _number(row.get("decoder_share"), 3),
            ]
        )  # fmt: skip
    reference = result["reference"]
    caption = (
        f"{result['count']} samples ({result['labels']}), features {network.split(':')[0]} (weights "
        f"{result['features'][network][:8]}), reference {reference['source']}, crop {reference['crop']}"
    )
    return _aligned(caption, header, rows)


def _gap(gaps: dict[str, dict[str, float]], network: str) -> str:
    letters = _distance(network)
    header = ["decoder", f"g{letters}", f"r{letters}", "gap", f"r{letters} to reference", "gap", "KID gap"]
    keys = ("gfid", "rfid", "gap", "rfid_to_reference", "gap_to_reference")
    rows = [
        [name, *(_number(gap[key], 3) for key in keys), _number(gap.get("kid_gap"), 4)] for name, gap in gaps.items()
    ]
    return _aligned(f"generation gap: g{letters} minus r{letters} of held-out images", header, rows)


def _noise(decoders: dict[str, list[dict[str, float]]], network: str) -> str:
    header = ["decoder", *(f"{line['noise']:g} std" for line in next(iter(decoders.values())))]
    rows = [[name, *(_number(line["frechet_to_originals"], 3) for line in lines)] for name, lines in decoders.items()]
    return _aligned(f"r{_distance(network)} with noise on the latents", header, rows)


def _sweep(lines: list[dict[str, Any]], network: str) -> str:
    header = ["guidance", "steps", *lines[0]["distances"]]
    rows = [
        [f"{line['cfg_scale']:g}", str(line["steps"])]
        + [_number(scores[network]["frechet"], 3) for scores in line["distances"].values()]
        for line in lines
    ]
    return _aligned(f"g{_distance(network)} of {lines[0]['n']} samples per setting", header, rows)


def _distance(network: str) -> str:
    return "FID" if network == "inception" else "FD"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _aligned(caption: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([caption, *aligned])
