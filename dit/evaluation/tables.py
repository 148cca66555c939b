"""The result of an evaluation as text. A Frechet distance is called FID on Inception's features only."""

from __future__ import annotations

from typing import Any

from ssdd.engine.tables import aligned, fixed


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
        copies = f"{fixed(d.get('copy_rate'), 3)} ({fixed(d.get('copy_rate_held_out'), 3)})"
        rows.append(
            [
                row["name"], fixed(d["frechet"], 3), fixed(floor.get("frechet"), 3),
                fixed(d.get("spatial_frechet"), 3), fixed(d.get("inception_score"), 2), kid,
                fixed(d.get("precision"), 3), fixed(d.get("recall"), 3), copies,
                fixed(row.get("images_per_s"), 1), fixed(row.get("sampling_images_per_s"), 1),
                fixed(row.get("decoder_share"), 3),
            ]
        )  # fmt: skip
    reference = result["reference"]
    caption = (
        f"{result['count']} samples ({result['labels']}), features {network.split(':')[0]} (weights "
        f"{result['features'][network][:8]}), reference {reference['source']}, crop {reference['crop']}"
    )
    return f"{caption}\n{aligned(header, rows)}"


def _gap(gaps: dict[str, dict[str, float]], network: str) -> str:
    letters = _distance(network)
    header = ["decoder", f"g{letters}", f"r{letters}", "gap", f"r{letters} to reference", "gap", "KID gap"]
    keys = ("gfid", "rfid", "gap", "rfid_to_reference", "gap_to_reference")
    rows = [[name, *(fixed(gap[key], 3) for key in keys), fixed(gap.get("kid_gap"), 4)] for name, gap in gaps.items()]
    return f"generation gap: g{letters} minus r{letters} of held-out images\n{aligned(header, rows)}"


def _noise(decoders: dict[str, list[dict[str, float]]], network: str) -> str:
    header = ["decoder", *(f"{line['noise']:g} std" for line in next(iter(decoders.values())))]
    rows = [[name, *(fixed(line["frechet_to_originals"], 3) for line in lines)] for name, lines in decoders.items()]
    return f"r{_distance(network)} with noise on the latents\n{aligned(header, rows)}"


def _sweep(lines: list[dict[str, Any]], network: str) -> str:
    header = ["guidance", "steps", *lines[0]["distances"]]
    rows = [
        [f"{line['cfg_scale']:g}", str(line["steps"])]
        + [fixed(scores[network]["frechet"], 3) for scores in line["distances"].values()]
        for line in lines
    ]
    return f"g{_distance(network)} of {lines[0]['n']} samples per setting\n{aligned(header, rows)}"


def _distance(network: str) -> str:
    return "FID" if network == "inception" else "FD"
