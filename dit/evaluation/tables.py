"""The result of an evaluation as text. A Frechet distance is called FID on Inception's features only."""

from __future__ import annotations

from typing import Any

from ssdd.engine.tables import aligned, fixed
from ssdd.fidelity.set_metrics import SET_METRICS, distance_name


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
    metrics = {key: metric for key, metric in SET_METRICS.items() if metric.label}
    titles = [metric.title(network, "g") + " [95 %]" * (f"{key}_low" in SET_METRICS) for key, metric in metrics.items()]
    costs = {"images_per_s": ("decode/s", 1), "sampling_images_per_s": ("total/s", 1)}
    costs |= {"decoder_share": ("decoder's share", 3)}
    labels = [label for label, _ in costs.values()]
    header = ["decoder", *titles, f"{distance_name(network)} floor", "copies (reals)", *labels]
    floor = result["floor"].get(network, {})
    rows = []
    for row in result["rows"]:
        d = row["distances"][network]
        copies = f"{fixed(d.get('copy_rate'), 3)} ({fixed(d.get('copy_rate_held_out'), 3)})"
        figures = [_figure(d, key, metric.decimals) for key, metric in metrics.items()]
        speeds = [fixed(row.get(key), digits) for key, (_, digits) in costs.items()]
        rows.append([row["name"], *figures, fixed(floor.get("frechet"), 3), copies, *speeds])
    reference = result["reference"]
    caption = (
        f"{result['count']} samples ({result['labels']}), features {network.split(':')[0]} (weights "
        f"{result['features'][network][:8]}), reference {reference['source']}, crop {reference['crop']}"
    )
    return f"{caption}\n{aligned(header, rows)}"


def _gap(gaps: dict[str, dict[str, float]], network: str) -> str:
    letters = distance_name(network)
    header = ["decoder", f"g{letters}", f"r{letters}", "gap", f"r{letters} to reference", "gap", "KID gap"]
    keys = ("gfid", "rfid", "gap", "rfid_to_reference", "gap_to_reference")
    rows = [[name, *(fixed(gap[key], 3) for key in keys), fixed(gap.get("kid_gap"), 4)] for name, gap in gaps.items()]
    return f"generation gap: g{letters} minus r{letters} of held-out images\n{aligned(header, rows)}"


def _noise(decoders: dict[str, list[dict[str, float]]], network: str) -> str:
    header = ["decoder", *(f"{line['noise']:g} std" for line in next(iter(decoders.values())))]
    rows = [[name, *(fixed(line["frechet_to_originals"], 3) for line in lines)] for name, lines in decoders.items()]
    return f"r{distance_name(network)} with noise on the latents\n{aligned(header, rows)}"


def _sweep(lines: list[dict[str, Any]], network: str) -> str:
    header = ["guidance", "steps", *lines[0]["distances"]]
    rows = [
        [f"{line['cfg_scale']:g}", str(line["steps"])]
        + [fixed(scores[network]["frechet"], 3) for scores in line["distances"].values()]
        for line in lines
    ]
    return f"g{distance_name(network)} of {lines[0]['n']} samples per setting\n{aligned(header, rows)}"


def _figure(scores: dict[str, float], key: str, digits: int) -> str:
    """A figure, with its interval where it has one."""
    if f"{key}_low" not in scores:
        return fixed(scores.get(key), digits)
    low, high = (fixed(scores[f"{key}_{end}"], digits) for end in ("low", "high"))
    return f"{fixed(scores[key], digits)} [{low}, {high}]"
