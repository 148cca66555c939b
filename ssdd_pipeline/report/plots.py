"""Plots of a report: matplotlib's SVG, inline, in the colours of the page, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from ssdd.fidelity.set_metrics import distance_name
from ssdd_pipeline.report.results import FinishedEvaluation, family, short
from ssdd_pipeline.report.tables import FLOOR

MARKERS = "osD^vP"
# Colours that stand for the page's variables --series-0 ... and currentColor, and are replaced in the SVG.
SERIES = [f"#5e71e{i}" for i in range(6)]
TEXT, MUTED = "#7e1700", "#7e1701"
STYLE = {
    "svg.fonttype": "none", "font.size": 10, "axes.edgecolor": MUTED, "axes.labelcolor": TEXT, "text.color": TEXT,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": TEXT, "ytick.labelcolor": TEXT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": MUTED, "grid.alpha": 0.25,
    "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """svg: an element for the page's body, trusted as it is."""

    caption: str
    svg: Markup


@dataclass(frozen=True)
class Curve:
    """Points (x, value, low, high) of one decoder; low and high may be None. place: of its colour."""

    label: str
    points: list[tuple[float, float, float | None, float | None]]
    place: int
    marker: str = "o"
    line: str = "-"


def draw(
    name: str, caption: str, curves: Sequence[Curve], x: str, y: str, floor: float | None = None, **scales: Any
) -> Plot:
    """Curves with their intervals, and a floor as a dotted line. name: begins the ids inside the SVG.

    scales: xscale, yscale as in matplotlib; ticks: places of the ticks of x.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for curve in curves:
            xs, values, lows, highs = zip(*curve.points, strict=True)
            colour = SERIES[curve.place % len(SERIES)]
            style = {"color": colour, "marker": curve.marker, "linestyle": curve.line, "label": curve.label}
            if None in (*lows, *highs):
                axes.plot(xs, values, markersize=6 if len(xs) <= 8 else 0, **style)
                continue
            below = [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
            above = [max(0.0, high - value) for value, high in zip(values, highs, strict=True)]
            axes.errorbar(xs, values, (below, above), markersize=6, capsize=3, elinewidth=1, **style)
        if floor is not None:
            axes.axhline(floor, color=MUTED, linestyle=":", label=FLOOR)
        ticks = scales.pop("ticks", None)
        axes.set(xlabel=x, ylabel=y, **scales)
        if scales.get("yscale") == "log":
            axes.yaxis.set_major_formatter("{x:g}")
        if scales.get("xscale") == "log":
            ticks = ticks or round_numbers(*axes.get_xlim())
        if ticks is not None:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.xaxis.minorticks_off()
        figure.legend(loc="outside upper left", ncols=3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Plot(caption, inline(buffer.getvalue(), name, caption))


def round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 ... of [low, high], or its ends where there are fewer than two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    found = [number for number in found if low <= number <= high]
    return found if len(found) > 1 else [float(f"{low:.2g}"), float(f"{high:.2g}")]


def inline(svg: str, name: str, label: str) -> Markup:
    """matplotlib's SVG file as an element of a page: own ids, no size, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r' (xmlns|xmlns:xlink)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for place, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--series-{place})")
    svg = svg.replace(TEXT, "currentColor").replace(MUTED, "var(--muted)")
    return Markup(svg.replace("<svg", f'<svg class="plot" role="img" aria-label="{escape(label)}"', 1))


def quality_plots(evaluation: FinishedEvaluation, network: str, name: str) -> list[Plot]:
    """Distance against decoder steps, and against decoding time, on one network. name: begins the ids of the SVG."""
    rows = [row for row in evaluation.result["rows"] if row["name"] in evaluation.decoders]
    families = list(dict.fromkeys(family(row["name"]) for row in rows))
    has_kid = all("kid" in row["distances"][network] for row in rows)
    distance = "KID" if has_kid else distance_name(network)
    key = "kid" if has_kid else "frechet"
    floor = evaluation.result["floor"].get(network, {}).get(key) if has_kid or evaluation.generates else None
    whose = "generated images" if evaluation.generates else "reconstructions"
    features = f"features {short(network)}"
    intervals = " with 95 % intervals" if has_kid else ""
    label = f"{'g' if evaluation.generates else 'r'}{distance}"

    def curves(position: Any) -> list[Curve]:
        found = []
        for place, label in enumerate(families):
            own = sorted((row for row in rows if family(row["name"]) == label), key=lambda row: row["steps"])
            points = [(position(row), *_values(row["distances"][network], key)) for row in own]
            found.append(Curve(label, points, place, MARKERS[place % len(MARKERS)]))
        return found

    plots = []
    steps = sorted({row["steps"] for row in rows})
    if len(steps) > 1:
        caption = f"{distance} of {whose} against decoder steps{intervals}, {features}."
        across = curves(lambda row: row["steps"])
        plots.append(draw(f"{name}-steps", caption, across, "decoder steps", label, floor, xscale="log", ticks=steps))
    if len(rows) > 1 and all(row.get("images_per_s") for row in rows):
        caption = f"{distance} of {whose} against decoding time{intervals}, {features}."
        across = curves(lambda row: 1000 / row["images_per_s"])
        plots.append(draw(f"{name}-time", caption, across, "decoding time, ms per image", label, floor, xscale="log"))
    return plots


def noise_plot(evaluation: FinishedEvaluation, network: str, name: str) -> list[Plot]:
    """How robust each decoder is to noise on the latents, where that was measured."""
    decoders = evaluation.result.get("latent_noise", {}).get(network)
    if not decoders:
        return []
    has_kid = all("kid" in line for lines in decoders.values() for line in lines)
    key, distance = ("kid", "KID") if has_kid else ("frechet", distance_name(network))
    families = list(dict.fromkeys(family(decoder) for decoder in decoders))
    curves = []
    for i, (decoder, lines) in enumerate(decoders.items()):
        points = [(line["noise"], *_values(line, key)) for line in lines]
        first = next(other for other in decoders if family(other) == family(decoder)) == decoder
        place = families.index(family(decoder))
        curves.append(Curve(decoder, points, place, MARKERS[i % len(MARKERS)], "-" if first else "--"))
    caption = f"Robustness: {distance} of reconstructions from latents with added noise, features {short(network)}."
    return [draw(f"{name}-noise", caption, curves, "noise, standard deviations of the latents", f"r{distance}")]


def sweep_plots(evaluation: FinishedEvaluation, network: str, name: str) -> list[Plot]:
    """Distance against guidance and against sampler steps, where small sets were drawn for several of them."""
    lines: Sequence[Mapping[str, Any]] = evaluation.result.get("sweep", [])
    plots = []
    for x, other, label in (("cfg_scale", "steps", "guidance scale"), ("steps", "cfg_scale", "sampler steps")):
        if len({line[x] for line in lines}) < 2:
            continue
        decoders = list(lines[0]["distances"])
        curves = []
        for i, value in enumerate(sorted({line[other] for line in lines})):
            own = sorted((line for line in lines if line[other] == value), key=lambda line: line[x])
            for place, decoder in enumerate(decoders):
                points = [(line[x], *_values(line["distances"][decoder][network], "frechet")) for line in own]
                title = f"{decoder}, {'guidance' if other == 'cfg_scale' else 'steps'} {value:g}"
                curves.append(Curve(title, points, place, MARKERS[i % len(MARKERS)]))
        distance = f"g{distance_name(network)}"
        caption = f"{distance} of {lines[0]['n']} samples per point against {label}, features {short(network)}."
        plots.append(draw(f"{name}-sweep-{x}", caption, curves, label, distance))
    return plots


def loss_plot(losses: Mapping[str, Sequence[tuple[int, float]]]) -> Plot:
    """Training losses: run -> (step, loss)."""
    curves = [
        Curve(run, [(step, loss, None, None) for step, loss in points], place)
        for place, (run, points) in enumerate(losses.items())
        if points
    ]
    return draw(
        "losses",
        "Training losses, as in each run's metrics.jsonl.",
        curves,
        "step",
        "velocity or distillation MSE",
        yscale="log",
    )


def _values(scores: Mapping[str, float], key: str) -> tuple[float, float | None, float | None]:
    return scores[key], scores.get(f"{key}_low"), scores.get(f"{key}_high")
