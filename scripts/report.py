"""The pipeline's outcome: one table in text, and a self-contained report.html."""

from __future__ import annotations

import base64
import html
import io
import platform
from pathlib import Path
from typing import Any

from ssdd.engine.features import LITE0
from ssdd.engine.files import read_json, write_atomic
from ssdd.engine.run import RunDirectory

from .stages import (
    DIT,
    GENERATION,
    RECONSTRUCTION,
    STUDENT,
    TOKENIZER,
    PipelineConfig,
    Stage,
    curve_steps,
)

BASELINES = ("blur", "PCA-")
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1d2330;background:#fff;max-width:1400px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid #d5dae3}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #e6e9ef;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.baseline td{color:#68707f}
figure{margin:1rem 0}figcaption{font-size:.9rem;color:#4a5161}img{max-width:100%;image-rendering:pixelated}
img.plot{image-rendering:auto}.pictures img{width:100%;max-width:640px}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(280px,1fr));gap:1rem}
code{background:#f3f5f8;padding:.1rem .3rem;border-radius:3px;overflow-wrap:anywhere}
@media print{body{max-width:none;font-size:11pt}h2{break-after:avoid}figure{break-inside:avoid}}
"""


def write_report(cfg: PipelineConfig, stages: list[Stage]) -> str:
    """Write report.html beside the stages' folders; returns the table as text."""
    root = Path(cfg.ckpt_dir) / cfg.name
    jobs = root / "jobs"
    reconstruction = read_json(jobs / RECONSTRUCTION / "task_result.json")
    generation = read_json(jobs / GENERATION / "task_result.json")
    networks = list(reconstruction["features"])
    tables = [table(cfg, reconstruction, generation, network) for network in networks]
    text = "\n\n".join(as_text(caption, header, rows) for caption, header, rows in tables)
    summary = (
        f"{reconstruction['count']} reconstructed and {generation['count']} generated images; class accuracy on real "
        f"held-out images {generation['class_accuracy_held_out']:.3f}"
        if "class_accuracy_held_out" in generation
        else f"{reconstruction['count']} reconstructed and {generation['count']} generated images"
    )
    page = [
        f"<h1>{html.escape(cfg.name)}: from images to generated images</h1><p>{html.escape(summary)}</p>",
        "<h2>Quality and speed</h2>",
        *(as_html(caption, header, rows) for caption, header, rows in tables),
        reconstruction_pictures(cfg, jobs),
        generation_pictures(cfg, jobs),
        "<h2>Curves</h2><div class=columns>",
        loss_plot(root, cfg),
        *(steps_plot(cfg, reconstruction, network) for network in networks),
        "</div>",
        stage_table(root, stages),
        provenance(cfg, reconstruction, generation),
    ]
    body = "\n".join(page)
    write_atomic(
        root / "report.html",
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(cfg.name)}</title><style>{STYLE}</style><body>{body}</body></html>",
    )
    return f"{text}\n\n{summary}\nreport: {root / 'report.html'}"


def table(cfg: PipelineConfig, reconstruction: dict, generation: dict, network: str) -> tuple[str, list[str], list]:
    """(caption, header, rows of cells) on the features of one network; a row is a decoder or a baseline."""
    short = network.split(":")[0]
    header = [
        "decoder", "PSNR", "SSIM", "rKID", "rFD (floor)", "gKID", "gFD (floor)",
        "precision", "recall", "class acc.", "images/s",
    ]  # fmt: skip
    reconstructed = {row["name"]: row for row in reconstruction["rows"]}
    generated = {row["name"]: row for row in generation["rows"]}
    hidden = {f"teacher-{k}" for k in curve_steps(cfg.teacher_steps)}
    rows = []
    for name in dict.fromkeys([*reconstructed, *generated]):
        if name in hidden:
            continue
        r, g = reconstructed.get(name), generated.get(name)
        rd, gd = (row["distances"][network] if row else None for row in (r, g))
        rows.append(
            [
                name,
                _number(r, "PSNR", 2),
                _number(r, "SSIM", 4),
                _kid(rd),
                _distance(rd, reconstruction["floor"][network]),
                _kid(gd),
                _distance(gd, generation["floor"][network]),
                _number(gd, "precision", 3),
                _number(gd, "recall", 3),
                _number(g, "class_accuracy", 3),
                _number(g, "images_per_s", 1),
            ]
        )
    floors = [side["floor"][network]["kid"] for side in (reconstruction, generation)]
    caption = (
        f"Features: {short}. r: reconstructions of {reconstruction['count']} held-out images; g: {generation['count']} "
        "generated images. KID with its 95 % bootstrap interval, against training images; the held-out images "
        f"themselves score {floors[0]:.4f} (r) and {floors[1]:.4f} (g). FD: Frechet distance of these features, rFD to "
        f"the originals, gFD to the training images; in brackets that of {reconstruction['count']} (r) and "
        f"{generation['floor'][network]['count']} (g) held-out images to training images."
    )
    if short in loss_networks(cfg):
        caption += " Optimised: these features were also a training loss, which makes them no judge."
    return caption, header, rows


def loss_networks(cfg: PipelineConfig) -> list[str]:
    """Pretrained networks in the losses of tokenizer or student, under the names of feature networks."""
    from omegaconf import OmegaConf

    root = Path(cfg.ckpt_dir) / cfg.name
    networks = set()
    for run in (TOKENIZER, STUDENT):
        config = OmegaConf.load(RunDirectory(root, run).path / "config.yaml")
        named = {
            "lpips": "vgg16",
            "repa": config["aux_losses"]["repa"]["model"],
            "features": config["aux_losses"]["features"]["model"].replace(LITE0, "efficientnet_lite0"),
        }
        networks |= {name for loss, name in named.items() if config["losses"][loss]}
    return sorted(networks)


def as_text(caption: str, header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned for a terminal."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([caption, aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def as_html(caption: str, header: list[str], rows: list[list[str]]) -> str:
    """The same as an HTML table that scrolls sideways on narrow screens."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=baseline' if row[0].startswith(BASELINES) else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return (
        f"<p>{html.escape(caption)}</p><div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def reconstruction_pictures(cfg: PipelineConfig, jobs: Path) -> str:
    """Originals, teacher, student and baselines, one strip below the other."""
    folder = jobs / RECONSTRUCTION / "pictures"
    names = ["originals", f"teacher-{cfg.teacher_steps}", "teacher-1", "student-1"]
    names += sorted(path.stem for path in folder.glob("PCA-*.png"))
    strips = "".join(_picture(folder / f"{name}.png", name) for name in names)
    return f"<h2>Reconstructions of held-out images</h2><div class=pictures>{strips}</div>"


def generation_pictures(cfg: PipelineConfig, jobs: Path) -> str:
    """The same latents through both decoders, one row of images a class."""
    folder = jobs / GENERATION / "pictures"
    names = [f"teacher-{cfg.teacher_steps}", "student-1"]
    grids = "".join(_picture(folder / f"{name}.png", f"{name}: one row a class") for name in names)
    return f"<h2>Generated images, the same latents in both decoders</h2><div class='columns pictures'>{grids}</div>"


def loss_plot(root: Path, cfg: PipelineConfig) -> str:
    """Training losses of tokenizer, student and generator."""
    figure, axes = _figure()
    for run, column in ((TOKENIZER, "diffusion"), (STUDENT, "diffusion"), (DIT, "loss")):
        lines = [line for line in RunDirectory(root, run).read_metrics() if column in line]
        axes.plot([line["step"] for line in lines], [line[column] for line in lines], label=run)
    axes.set(xlabel="step", ylabel="loss (velocity or distillation MSE)", yscale="log")
    axes.legend()
    return _plot(figure, "Training losses")


def steps_plot(cfg: PipelineConfig, reconstruction: dict, network: str) -> str:
    """KID of the teacher's reconstructions against its steps, and the student's single step, with 95 % intervals."""
    figure, axes = _figure()
    rows = {row["name"]: row["distances"][network] for row in reconstruction["rows"]}
    steps = sorted({1, *curve_steps(cfg.teacher_steps), cfg.teacher_steps})
    for label, marker, points in (
        ("teacher", "o", {k: rows[f"teacher-{k}"] for k in steps}),
        ("student", "*", {1: rows["student-1"]}),
    ):
        values = [row["kid"] for row in points.values()]
        below = [max(0.0, row["kid"] - row["kid_low"]) for row in points.values()]
        above = [max(0.0, row["kid_high"] - row["kid"]) for row in points.values()]
        axes.errorbar(list(points), values, (below, above), marker=marker, markersize=8, capsize=3, label=label)
    axes.axhline(reconstruction["floor"][network]["kid"], color="gray", linestyle=":", label="held-out images")
    axes.set(xlabel="steps", ylabel="KID", xscale="log")
    axes.set_xticks(steps, steps)
    axes.minorticks_off()
    axes.legend()
    return _plot(figure, f"Reconstruction KID against steps, features {network.split(':')[0]}")


def stage_table(root: Path, stages: list[Stage]) -> str:
    """Time and memory of the stages, with their commands."""
    rows = []
    for stage in stages:
        record = read_json(root / "stages" / f"{stage.name}.json")
        used = f"{record['seconds']:.0f} s, {record['peak_memory_bytes'] / 2**30:.1f} GiB"
        rows.append([stage.name, used, f"python -m {stage.module} {' '.join(stage.arguments)}"])
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{seconds}</td><td style='text-align:left;white-space:normal'>"
        f"<code>{html.escape(command)}</code></td></tr>"
        for name, seconds, command in rows
    )
    return f"<h2>Stages</h2><div class=scroll><table><tbody>{body}</tbody></table></div>"


def provenance(cfg: PipelineConfig, reconstruction: dict, generation: dict) -> str:
    """Where the figures come from."""
    import torch

    checksums = {name.split(":")[0]: digest for name, digest in reconstruction["features"].items()}
    facts = {
        "images": f"{cfg.dataset.source}, {cfg.dataset.im_size} px, fingerprint {reconstruction['data'][:16]}",
        "crop": f"reconstructions {reconstruction['crop']}, generation reference {generation['reference']['crop']}",
        "labels": "balanced" if generation["samples"].get("balanced", True) else "random",
        "rounding": "clamp to [-1, 1], scale to 0..255, round",
        "feature networks (sha256)": ", ".join(f"{name} {digest[:16]}" for name, digest in checksums.items()),
        "loss networks": ", ".join(loss_networks(cfg)) or "none",
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "skipped images": str(len(reconstruction["skipped"])),
        "left out for want of weights": ", ".join(reconstruction["left_out"]) or "nothing",
    }
    items = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    return f"<h2>Provenance</h2><div class=scroll><table><tbody>{items}</tbody></table></div>"


def _number(row: dict[str, Any] | None, key: str, digits: int) -> str:
    return "-" if row is None or row.get(key) is None else f"{row[key]:.{digits}f}"


def _kid(distances: dict[str, float] | None) -> str:
    if distances is None:
        return "-"
    return f"{distances['kid']:.4f} [{distances['kid_low']:.4f}, {distances['kid_high']:.4f}]"


def _distance(distances: dict[str, float] | None, floor: dict[str, float]) -> str:
    return "-" if distances is None else f"{distances['frechet']:.3f} ({floor['frechet']:.3f})"


def _picture(path: Path, caption: str) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f"<figure><figcaption>{text}</figcaption><img alt='{text}' src='data:image/png;base64,{data}'></figure>"


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    return figure, figure.add_subplot()


def _plot(figure: Any, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    image = f"<img class=plot alt='{text}' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
