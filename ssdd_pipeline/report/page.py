"""A self-contained page of evaluations: `python scripts/report.py runs/jobs/NAME [MORE ...] out=report.html`.

NAME: a folder with the task_result.json of `ssdd/main.py task=eval` or `dit/main.py task=evaluate`. The pipeline writes
the same page with its stages and training losses, and prints the table that `summary` makes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, write_atomic
from ssdd.engine.program import named_paths, run_program
from ssdd.engine.run import RunDirectory
from ssdd_pipeline.report import plots
from ssdd_pipeline.report.pictures import Gallery, generation_gallery, reconstruction_gallery
from ssdd_pipeline.report.results import NOT_RECORDED, FinishedEvaluation, open_evaluation, provenance, short
from ssdd_pipeline.report.tables import Table, gap_table, paired_table, quality_table, summary, verdict

if TYPE_CHECKING:
    from ssdd_pipeline.stages import PipelineConfig, Stage

TEMPLATE, STYLE = "page.html", "page.css"


@dataclass
class ReportConfig:
    """A page of finished evaluations."""

    results: list[str] = field(default_factory=list)
    """Folders with a task_result.json; the same as giving them without a key."""
    out: str = "report.html"
    """File of the page."""
    title: str | None = None
    """Title of the page; null: the folders' names."""


@dataclass(frozen=True)
class Judged:
    """Figures on one feature network."""

    network: str
    tables: list[Table]
    plots: list[plots.Plot]


@dataclass(frozen=True)
class Section:
    """One evaluation on the page; id: where its figures' provenance is linked to."""

    id: str
    title: str
    findings: list[str]
    judged: list[Judged]
    gallery: Gallery | None
    generates: bool
    provenance: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class StageRow:
    """A stage of the pipeline: what it took, its precision and its command."""

    name: str
    used: str
    precision: str
    command: str


def main(argv: list[str] | None = None) -> int:
    """Write the page; 2 for an error that the user can mend."""
    return run_program(_run, argv)


def _run(argv: list[str]) -> None:
    paths, keys = named_paths(argv)
    cfg = parse(ReportConfig, keys, program="report", description=__doc__ or "")
    folders = [Path(path) for path in cfg.results + paths]
    if not folders:
        raise UserError("give folders of finished evaluations: python scripts/report.py runs/jobs/NAME out=FILE")
    evaluations = [open_evaluation(folder) for folder in folders]
    title = cfg.title or ", ".join(folder.resolve().name for folder in folders)
    write_atomic(cfg.out, render(title, [section(evaluation, i) for i, evaluation in enumerate(evaluations)]))
    print(f"report: {cfg.out}")


def write_report(cfg: PipelineConfig, stages: Sequence[Stage]) -> str:
    """Write a pipeline's report.html next to the stages' folders; returns the table as text."""
    from ssdd_pipeline.stages import DIT, GENERATION, RECONSTRUCTION, STUDENT, TOKENIZER, curve_steps

    directory = Path(cfg.ckpt_dir) / cfg.name
    reconstruction, generation = (open_evaluation(directory / "jobs" / n) for n in (RECONSTRUCTION, GENERATION))
    pair = [f"teacher-{cfg.teacher_steps}", "student-1"]
    sections = [section(evaluation, i, pair) for i, evaluation in enumerate((reconstruction, generation))]
    losses = {
        run: [(line["step"], line[key]) for line in RunDirectory(directory, run).read_metrics() if line.get(key)]
        for run, key in ((TOKENIZER, "diffusion"), (STUDENT, "diffusion"), (DIT, "loss"))
    }
    rows = [stage_row(stage, read_json(directory / "stages" / f"{stage.name}.json")) for stage in stages]
    page = render(f"{cfg.name}: from images to generated images", sections, plots.loss_plot(losses), rows)
    write_atomic(directory / "report.html", page)
    text = summary(reconstruction, generation, hidden={f"teacher-{k}" for k in curve_steps(cfg.teacher_steps)})
    return f"{text}\n{precisions(rows)}\nreport: {directory / 'report.html'}"


def section(evaluation: FinishedEvaluation, number: int, pair: Sequence[str] = ()) -> Section:
    """Everything of an evaluation. pair: the decoders whose pictures are set against each other; default: all."""
    judged = []
    for i, network in enumerate(evaluation.networks):
        tables = [make(evaluation, network) for make in (quality_table, gap_table, paired_table)]
        makers = (plots.quality_plots, plots.noise_plot, plots.sweep_plots)
        curves = [plot for make in makers for plot in make(evaluation, network, f"plot-{number}-{i}")]
        found = [table for table in tables if table is not None]
        judged.append(Judged(short(network), found, curves))
    pair = [name for name in pair if name in evaluation.decoders] or evaluation.decoders
    return Section(
        id=f"evaluation-{number}",
        title=evaluation.title
        if evaluation.title.lower() == evaluation.name
        else f"{evaluation.title}: {evaluation.name}",
        findings=findings(evaluation, pair),
        judged=judged,
        gallery=generation_gallery(evaluation, pair) if evaluation.generates else reconstruction_gallery(evaluation),
        generates=evaluation.generates,
        provenance=provenance(evaluation),
    )


def findings(evaluation: FinishedEvaluation, pair: Sequence[str]) -> list[str]:
    """What the figures show about the first and the last decoder of `pair`, as far as they are decisive."""
    if len(pair) < 2:
        return []
    a, b = pair[0], pair[-1]
    said = []
    for network in evaluation.networks:
        difference = evaluation.result["paired"].get(network, {}).get(f"{a} - {b}")
        if difference is None:
            continue
        if evaluation.optimised(network):
            said.append(f"KID on {short(network)} is not used here: the network was a training loss.")
            continue
        closer = verdict(a, b, difference)
        what = "not distinguishable from" if closer is None else "better than" if closer == a else "worse than"
        interval = f"{difference['kid']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
        said.append(f"{a} is {what} {b} by KID on {short(network)}: paired difference {interval}.")
    rates = {row["name"]: row.get("images_per_s") for row in evaluation.result["rows"]}
    if rates[a] and rates[b]:
        said.append(
            f"{b} decodes {rates[b]:.1f} images/s, {a} {rates[a]:.1f}: {rates[b] / rates[a]:.2f} times the speed."
        )
    return said


def stage_row(stage: Stage, record: dict[str, Any]) -> StageRow:
    """Time, memory and command of a finished stage."""
    import shlex

    used = f"{record['seconds']:.0f} s, {record['peak_memory_bytes'] / 2**30:.1f} GiB"
    return StageRow(stage.name, used, precision_of(stage), shlex.join(["python", "-m", stage.module, *stage.arguments]))


def precision_of(stage: Stage) -> str:
    """The recorded precision of a finished stage, such as "auto: bf16, AVX512-BF16"."""
    result = read_json(stage.outputs[-1])
    return result.get("precision", result.get("encoding", {}).get("precision", {})).get("why", NOT_RECORDED)


def precisions(rows: Sequence[StageRow]) -> str:
    """One line: which stages computed in what."""
    stages: dict[str, list[str]] = {}
    for row in rows:
        stages.setdefault(row.precision, []).append(row.name)
    return "precision: " + "; ".join(f"{', '.join(names)}: {precision}" for precision, names in stages.items())


def render(
    title: str, sections: Sequence[Section], losses: plots.Plot | None = None, stages: Sequence[StageRow] = ()
) -> str:
    """The page; every value is escaped, but for the SVG elements of the plots."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup((Path(__file__).parent / STYLE).read_text(encoding="utf-8"))
    return environment.get_template(TEMPLATE).render(
        title=title, sections=sections, losses=losses, stages=stages, style=style
    )


if __name__ == "__main__":
    sys.exit(main())
