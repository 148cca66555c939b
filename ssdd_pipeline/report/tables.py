"""Tables of a report: every figure of an evaluation with its floor, its interval and what it was against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ssdd.engine.tables import aligned
from ssdd.fidelity.pixel_metrics import PIXEL_METRICS
from ssdd.fidelity.set_metrics import SET_METRICS, distance_name
from ssdd.losses.perceptual import PERCEPTUAL_METRICS
from ssdd_pipeline.report.results import FinishedEvaluation, short

FLOOR = "held-out images"


@dataclass(frozen=True)
class Cell:
    """detail: an interval or a comparison, in small print."""

    text: str
    detail: str = ""


NOTHING = Cell("–")


@dataclass(frozen=True)
class Heading:
    """better: an arrow; optimised: whether its network was a training loss of a decoder in the table."""

    label: str
    better: str = ""
    optimised: bool = False


@dataclass(frozen=True)
class Table:
    """rows: (kind, cells), the first cell is the row's name; kind is decoder, baseline, floor or pair."""

    caption: str
    columns: list[Heading]
    rows: list[tuple[str, list[Cell]]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Metric:
    """A column, present when a row has a value. cell: (row, its scores on the network) -> cell, or None."""

    label: str
    better: str
    cell: Callable[[dict, dict], Cell | None]
    network: str | None = None


def number(key: str, digits: int) -> Callable[[dict, dict], Cell | None]:
    """A cell of a row's own value, or else of its scores'."""

    def cell(row: dict, scores: dict) -> Cell | None:
        value = row.get(key, scores.get(key))
        return None if value is None else Cell(f"{value:.{digits}f}")

    return cell


def kid(row: dict, scores: dict, to: str = "") -> Cell | None:
    """KID and its interval. to: the end of the keys of another reference than the table's."""
    if scores.get(f"kid{to}") is None:
        return None
    return Cell(f"{scores[f'kid{to}']:.4f}", f"[{scores[f'kid_low{to}']:.4f}, {scores[f'kid_high{to}']:.4f}]")


def quality_table(evaluation: FinishedEvaluation, network: str) -> Table:
    """All decoders and baselines on the features of one network, the held-out images themselves below them."""
    result, letter = evaluation.result, "g" if evaluation.generates else "r"
    floor = result["floor"].get(network, {})
    name = distance_name(network)

    def ratio(row: dict, scores: dict) -> Cell | None:
        if not floor.get("frechet") or scores is floor or "frechet" not in scores:
            return None
        return Cell(f"{scores['frechet'] / floor['frechet']:.2f}")

    beside = {
        "kid": Metric(f"{letter}KID to held-out [95 %]", "↓", partial(kid, to="_to_held_out"), network),
        "frechet": Metric(f"{letter}{name} ÷ floor", "↓", ratio, network),
    }
    distances = []
    for key, metric in SET_METRICS.items():
        if metric.label:
            title, cell = metric.title(network, letter), number(key, metric.decimals)
            if key == "kid":
                title, cell = f"{title} [95 %]", kid
            distances += [Metric(title, metric.better, cell, network), *([beside[key]] if key in beside else [])]
    distances.append(Metric("copy rate", "", number("copy_rate", 3), network))
    pixels = [
        Metric(metric.label, metric.better, number(key, metric.decimals))
        for key, metric in PIXEL_METRICS.items()
        if metric.label
    ]
    pixels += [
        Metric(metric.label, "↓", number(key, metric.decimals), metric.network)
        for key, metric in PERCEPTUAL_METRICS.items()
    ]
    pixels.append(Metric("noise R²", "", number("noise_r2", 3)))
    costs = [
        Metric("class acc.", "↑", number("class_accuracy", 3)),
        Metric("decode images/s", "↑", number("images_per_s", 1)),
        Metric("total images/s", "↑", number("sampling_images_per_s", 1)),
        Metric("decoder's share", "↓", number("decoder_share", 3)),
    ]
    lines = [
        ("decoder" if row["name"] in evaluation.decoders else "baseline", row, row["distances"][network])
        for row in evaluation.rows
    ]
    if floor:
        copies = lines[0][2].get("copy_rate_held_out")
        held_out = {"class_accuracy": result.get("class_accuracy_held_out"), "copy_rate": copies}
        lines.append(("floor", {"name": FLOOR} | held_out, floor))
    metrics = [*distances, *costs] if evaluation.generates else [*pixels, *distances, *costs]
    found = {metric: [metric.cell(row, scores) for _, row, scores in lines] for metric in metrics}
    shown = [metric for metric, cells in found.items() if any(cells)]
    optimised = {metric.label: evaluation.optimised(metric.network) for metric in shown if metric.network}
    columns = [Heading("decoder")]
    columns += [Heading(metric.label, metric.better, bool(optimised.get(metric.label))) for metric in shown]
    rows = [
        (kind, [Cell(row["name"]), *(found[metric][i] or NOTHING for metric in shown)])
        for i, (kind, row, _) in enumerate(lines)
    ]
    return Table(_caption(evaluation, network), columns, rows, _optimised_notes(evaluation, optimised))


def _caption(evaluation: FinishedEvaluation, network: str) -> str:
    result, name = evaluation.result, distance_name(network)
    count = result["count"]
    if evaluation.generates:
        source = result["reference"]["source"]
        caption = f"{count} generated images against the reference ({source}), features {short(network)}."
    else:
        caption = f"Reconstructions of {count} held-out images, features {short(network)}."
        caption += f" r{name} is to the originals; KID, precision and recall are to as many training images."
    if floor := result["floor"].get(network):
        what = "to training images" if not evaluation.generates else "to the reference"
        caption += f" Last row, the floor: {floor.get('count', count)} real held-out images {what}."
    return caption


def _optimised_notes(evaluation: FinishedEvaluation, optimised: dict[str, list[str]]) -> list[str]:
    decoders = sorted({name for names in optimised.values() for name in names}, key=evaluation.decoders.index)
    notes = []
    if decoders:
        notes.append(
            f"optimised: the column's network was a training loss of {', '.join(decoders)}; its figures are "
            f"biased in favour of {'it' if len(decoders) == 1 else 'them'}."
        )
    if unknown := [name for name, used in evaluation.loss_networks().items() if used is None]:
        notes.append(f"Training losses of {', '.join(unknown)}: unknown (config.yaml not found), so not marked.")
    return notes


def paired_table(evaluation: FinishedEvaluation, network: str) -> Table | None:
    """KID differences of decoders on the same latents; None where KID was not measured or there is one decoder."""
    paired = evaluation.result["paired"].get(network, {})
    rows = []
    for a, b in ((a, b) for i, a in enumerate(evaluation.decoders) for b in evaluation.decoders[i + 1 :]):
        if difference := paired.get(f"{a} - {b}"):
            interval = Cell(f"{difference['kid']:+.4f}", f"[{difference['low']:+.4f}, {difference['high']:+.4f}]")
            rows.append(("pair", [Cell(f"{a} − {b}"), interval, Cell(verdict(a, b, difference) or "undecided")]))
    if not rows:
        return None
    caption = f"KID differences, features {short(network)}: decoders of the same latents, images resampled together."
    optimised = bool(evaluation.optimised(network))
    columns = [Heading("decoders"), Heading("difference [95 %]", "", optimised), Heading("closer to real images")]
    return Table(caption, columns, rows)


def verdict(a: str, b: str, difference: dict[str, float]) -> str | None:
    """The decoder with the lower KID, or None when the interval has both signs."""
    if difference["low"] <= 0 <= difference["high"]:
        return None
    return a if difference["high"] < 0 else b


def gap_table(evaluation: FinishedEvaluation, network: str) -> Table | None:
    """The generation gap; None where it was not measured."""
    gaps = evaluation.result.get("gap", {}).get(network)
    if not gaps:
        return None
    name = distance_name(network)
    labels = {
        "gfid": f"g{name}", "rfid": f"r{name}", "gap": "gap", "rfid_to_reference": f"r{name} to reference",
        "gap_to_reference": "gap to reference",
    }  # fmt: skip
    optimised = bool(evaluation.optimised(network))
    columns = [Heading("decoder"), *(Heading(label, "↓", optimised) for label in (*labels.values(), "KID gap"))]
    rows = [
        ("decoder", [Cell(decoder), *(_cell(gap, key, 3) for key in labels), _cell(gap, "kid_gap", 4)])
        for decoder, gap in gaps.items()
    ]
    caption = (
        f"Generation gap, features {short(network)}: g{name} of generated images minus r{name} of reconstructed "
        f"held-out images. As r{name} is to the originals and has another bias, the gap is also given with the "
        "reconstructions held against the reference of the generated images, and in KID, which has no bias."
    )
    return Table(caption, columns, rows)


def _cell(values: dict[str, Any], key: str, digits: int) -> Cell:
    return NOTHING if values.get(key) is None else Cell(f"{values[key]:.{digits}f}")


def summary(reconstruction: FinishedEvaluation, generation: FinishedEvaluation, hidden: set[str]) -> str:
    """Both evaluations of a pipeline in one table per network, as text. hidden: rows that only the curves need."""
    r, g = reconstruction.result, generation.result
    reconstructed, generated = ({row["name"]: row for row in result["rows"]} for result in (r, g))
    counts = f"{r['count']} reconstructed and {g['count']} generated images"
    if "class_accuracy_held_out" in g:
        counts += f"; class accuracy on real held-out images {g['class_accuracy_held_out']:.3f}"
    parts = []
    for network in reconstruction.networks:
        fd, floors = distance_name(network), [result["floor"][network] for result in (r, g)]
        header = [
            "decoder", "PSNR", "SSIM", "rKID", f"r{fd} (floor)", "gKID", f"g{fd} (floor)", "precision", "recall",
            "class acc.", "images/s",
        ]  # fmt: skip
        rows = []
        for name in dict.fromkeys([*reconstructed, *generated]):
            if name in hidden:
                continue
            sides = [side.get(name, {}) for side in (reconstructed, generated)]
            own, drawn = ((side, side["distances"][network] if side else {}) for side in sides)
            cells = [number("PSNR", 2)(*own), number("SSIM", 4)(*own), kid(*own), _with_floor(own[1], floors[0])]
            cells += [kid(*drawn), _with_floor(drawn[1], floors[1]), number("precision", 3)(*drawn)]
            cells += [number("recall", 3)(*drawn), number("class_accuracy", 3)(*drawn)]
            cells += [number("images_per_s", 1)(*drawn)]
            rows.append([name, *(f"{cell.text} {cell.detail}".strip() if cell else "-" for cell in cells)])
        caption = (
            f"Features: {short(network)}. r: reconstructions of {r['count']} held-out images; g: {g['count']} "
            "generated images. KID with its 95 % bootstrap interval, against training images; the held-out images "
            f"themselves score {floors[0]['kid']:.4f} (r) and {floors[1]['kid']:.4f} (g). {fd}: Frechet distance of "
            f"these features, r{fd} to the originals, g{fd} to the training images; in brackets that of {r['count']} "
            f"(r) and {floors[1]['count']} (g) held-out images to training images."
        )
        if decoders := reconstruction.optimised(network):
            caption += (
                f" Optimised: a training loss of {', '.join(decoders)}, so its figures are biased in their favour."
            )
        parts.append(f"{caption}\n{aligned(header, rows, named=True, ruled=True)}")
    return "\n\n".join([*parts, counts])


def _with_floor(scores: dict, floor: dict) -> Cell | None:
    return Cell(f"{scores['frechet']:.3f} ({floor['frechet']:.3f})") if scores else None
