"""SSDD compared with its baselines at equal data and time: `python scripts/evidence.py minutes=55`.

One encoder is trained once and frozen. Then, for every seed: a teacher and the student distilled from it, and for the
time that both took together one direct decoder (one step from noise to real images) and one KL-VAE decoder. Jobs run
side by side, one thread each. An interrupted run continues; the table goes to `<out>/<name>.md` and `.json`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from ssdd.config import SSDDConfig
from ssdd.engine.cli import parse
from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, write_atomic, write_json
from ssdd.engine.program import run_program
from ssdd.engine.resumable import WorkRecord
from ssdd.engine.tables import markdown
from ssdd.images.sources import DatasetConfig

ENCODER, CLASSIFIER = "encoder", "classifier"
TEACHER_STEPS = (8, 4, 2, 1)
METRICS = {"PSNR": 2, "SSIM": 4, "power_ratio": 3, "noise_r2": 3}
SETUP = [
    "losses.lpips=0", "losses.repa=0", "training.compile=false", "training.optimizer=adamw",
    "training.lr_schedule=cosine", "training.betas=[0.9,0.99]", "training.warmup_steps=30", "training.grad_clip=1",
    "training.t_mean=0.4", "training.t_std=1.6", "training.ema.decays=[0.99]", "training.mixed_precision=no",
    "training.eval_freq=0", "training.save_every=200", "training.log_freq=50",
]  # fmt: skip


def fashion_mnist() -> DatasetConfig:
    return DatasetConfig(source="fashion_mnist", im_size=32, batch_size=16)


@dataclass
class EvidenceConfig:
    """Teacher, student, direct and KL decoders at equal data and wall-clock."""

    name: str = "fashion_mnist"
    """Runs are written to ckpt_dir/<name>."""
    ckpt_dir: str = "runs"
    """Folder of all runs."""
    out: str = "docs/results"
    """Folder of the table."""
    minutes: float = 55.0
    """Approximate wall-clock minutes of all training on this machine's cores."""
    seeds: int = 3
    """Number of seeds of the decoders; the encoder is shared."""
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Jobs that run at the same time, one thread each."""
    dataset: DatasetConfig = field(default_factory=fashion_mnist)
    """Images."""
    encoder: str = "f8c4"
    """Compression."""
    encoder_width: int = 16
    """Width of the encoder and of the KL decoder."""
    decoder: str = "XXS"
    """Size of the U-ViT decoders."""
    lr: float = 6e-3
    """Peak learning rate of encoder and U-ViT decoders."""
    kl_lr: float = 2e-3
    """Peak learning rate of the KL decoder."""
    taught_steps: int = 4
    """Steps of the teacher that the student learns from."""
    evaluated: int = 1000
    """Held-out images in the table."""


def main(argv: list[str] | None = None) -> int:
    """Train and evaluate what is missing, then print the table; 2 after an error that the user can mend."""
    return run_program(
        lambda words: run(parse(EvidenceConfig, words, program="evidence", description=__doc__ or "")), argv
    )


def run(cfg: EvidenceConfig) -> None:
    """The whole comparison."""
    folder = Path(cfg.ckpt_dir) / cfg.name
    tokenizer = [f"ssdd.encoder={cfg.encoder}", f"ssdd.encoder_width={cfg.encoder_width}", f"training.lr={cfg.lr}"]
    data = [f"dataset.{key}={value}" for key, value in vars(cfg.dataset).items() if value is not None]
    shared = [*data, *SETUP, *tokenizer, f"ckpt_dir={folder}"]
    uvit, frozen = f"ssdd.decoder={cfg.decoder}", f"ssdd.encoder_checkpoint={ENCODER}"
    teaching = [f"ssdd.fm_sampler.steps={cfg.taught_steps}", "distill_teacher=true", uvit]
    joint = [uvit, "ssdd.encoder_train=true", "ssdd.posterior_std=0.14"]
    methods = {
        "teacher": [uvit, frozen],
        "direct": [uvit, frozen, "objective=direct"],
        "kl": ["ssdd.decoder=kl", frozen, f"training.lr={cfg.kl_lr}"],
    }

    # The encoder gets an eighth of the time, then every seed an equal share of the rest.
    encoder_minutes = cfg.minutes / 8
    seconds = 60 * (cfg.minutes - encoder_minutes) * cfg.jobs / cfg.seeds / 3
    asked = {key: value for key, value in asdict(cfg).items() if key not in ("ckpt_dir", "out", "jobs")}
    record = WorkRecord(folder / "plan.json", {"asked": asked})
    if (found := record.found()) and not record.read():
        raise UserError(f"{folder} belongs to another comparison, with {found['asked']}; choose another name")
    plan = found or dict(record.request)
    if ENCODER not in plan:
        plan[ENCODER] = planned_steps([*shared, *joint], 60 * encoder_minutes)
        record.write(**plan)
    command([*shared, *joint, f"run_name={ENCODER}", f"training.steps={plan[ENCODER]}"])
    command([*data, "task=classifier", f"run_name={CLASSIFIER}", f"ckpt_dir={folder}"])
    if "student" not in plan:
        shares = {"teacher": 0.5 * seconds, "direct": seconds, "kl": seconds}
        plan |= {name: planned_steps([*shared, *methods[name]], shares[name]) for name in methods}
        plan["student"] = planned_steps([*shared, *teaching, f"ssdd.checkpoint={ENCODER}"], 0.5 * seconds)
        record.write(**plan)

    def train(name: str, seed: int, arguments: list[str]) -> None:
        command([*shared, *arguments, f"run_name={name}-{seed}", f"seed={seed}", f"training.steps={plan[name]}"])

    def distil(seed: int) -> None:
        train("teacher", seed, methods["teacher"])
        train("student", seed, [*teaching, f"ssdd.checkpoint=teacher-{seed}"])

    with ThreadPoolExecutor(cfg.jobs) as pool:
        jobs = []
        for seed in range(cfg.seeds):
            jobs.append(pool.submit(distil, seed))
            jobs += [pool.submit(train, name, seed, methods[name]) for name in ("direct", "kl")]
        for job in jobs:
            job.result()
        evaluations = [pool.submit(evaluate, cfg, seed, folder, data) for seed in range(cfg.seeds)]
        results = [job.result() for job in evaluations]
    trained = {
        f"{name}-{seed}": read_json(folder / "jobs" / f"{name}-{seed}" / "task_result.json")
        for name in (*methods, "student")
        for seed in range(cfg.seeds)
    }
    text = report(cfg, plan, trained, results)
    write_json(Path(cfg.out) / f"{cfg.name}.json", {"plan": plan, "trained": trained, "evaluations": results})
    write_atomic(Path(cfg.out) / f"{cfg.name}.md", text)
    print(text)


def command(arguments: list[str]) -> None:
    """Run `ssdd.main` unless its result is there; UserError if it fails."""
    options = dict(argument.split("=", 1) for argument in arguments)
    if (Path(options["ckpt_dir"]) / "jobs" / options["run_name"] / "task_result.json").is_file():
        return
    print(f"{options['run_name']} ...", flush=True)
    package_root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(package_root)}
    argv = [sys.executable, "-m", "ssdd.main", *arguments]
    done = subprocess.run(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise UserError(f"{options['run_name']} failed: {done.stdout[-2000:]}")


def planned_steps(arguments: list[str], seconds: float) -> int:
    """Training steps that take about `seconds` with one thread, measured."""
    import torch

    from ssdd.tasks.train import run as train

    torch.set_num_threads(1)
    keys = ["run_name=dry_run", "training.steps=1", "dry_run=true"]
    cfg = parse(SSDDConfig, [*arguments, *keys], program="ssdd", description="")
    return max(1, round(seconds / train(cfg)["seconds_a_step"]))


def evaluate(cfg: EvidenceConfig, seed: int, folder: Path, data: list[str]) -> dict[str, Any]:
    """The table of one seed, all decoders on the same images and noise; the 8-step teacher is the reference."""
    rows = [f"teacher-{n}:teacher-{seed}:{n}" for n in TEACHER_STEPS]
    rows += [f"{name}-1:{name}-{seed}:1" for name in ("student", "direct", "kl")]
    features = f"[efficientnet_lite0,classifier:{folder / 'jobs' / CLASSIFIER / 'classifier.safetensors'}]"
    name = f"evaluation-{seed}"
    command([*data, "task=eval", f"run_name={name}", f"ckpt_dir={folder}", f"evaluation.decoders=[{','.join(rows)}]",
             f"evaluation.features={features}", "evaluation.noise_draws=8", "evaluation.baselines=true",
             f"evaluation.limit={cfg.evaluated}", f"seed={seed}"])  # fmt: skip
    return read_json(folder / "jobs" / name / "task_result.json")


def report(cfg: EvidenceConfig, plan: dict, trained: dict, results: list[dict]) -> str:
    """Markdown: one table per feature network, means over seeds with their range, then the decisive differences."""
    lines = [f"# {cfg.name}: SSDD beside its baselines at equal data and time", ""]
    lines += [
        f"`python scripts/evidence.py{changed(cfg)}`, {machine(cfg)}.",
        "",
    ]
    seconds = {
        n: mean(trained[f"{n}-{s}"]["seconds"] for s in range(cfg.seeds))
        for n in ("teacher", "student", "direct", "kl")
    }
    times = ", ".join(f"{name} {plan[name]} steps, {value:.0f} s" for name, value in seconds.items())
    count = trained["teacher-0"]["parameters"], trained["kl-0"]["parameters"]
    lines += [f"Encoder {cfg.encoder}, frozen, {plan[ENCODER]} steps. Trained: {times}, one thread each. Parameters: "
              f"U-ViT {count[0]:,}, KL decoder {count[1]:,}. No pretrained network in any loss. Means over "
              f"{cfg.seeds} seeds [smallest, largest] on {results[0]['count']} held-out images.", ""]  # fmt: skip
    for network in results[0]["features"]:
        short = network.split(":")[0]
        floor = results[0]["floor"][network]
        lines += [f"## Features {short} (originals themselves: KID {floor['kid']:.4f}, FD {floor['frechet']:.2f})", ""]
        rows = []
        for i, row in enumerate(results[0]["rows"]):
            same = [result["rows"][i] for result in results]
            cells = [spread([r.get(metric) for r in same], digits) for metric, digits in METRICS.items()]
            cells += [spread([r["distances"][network][key] for r in same], 3) for key in ("kid", "frechet")]
            rows.append([row["name"], *cells])
        lines.append(markdown(["decoder", *METRICS, "KID", "FD"], rows))
        lines += ["", "KID differences with 95 % intervals over images, seed by seed:", ""]
        for pair in ("teacher-1 - student-1", "student-1 - direct-1", "student-1 - kl-1", "teacher-8 - student-1"):
            found = [result["paired"][network][pair] for result in results]
            intervals = "; ".join(f"{d['kid']:.3f} [{d['low']:.3f}, {d['high']:.3f}]" for d in found)
            lines.append(f"- {pair}: {intervals}")
        lines.append("")
    return "\n".join(lines)


def spread(values: list[float | None], digits: int) -> str:
    """Mean with the range over seeds."""
    if any(value is None for value in values):
        return "-"
    return f"{mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def changed(cfg: EvidenceConfig) -> str:
    """The arguments that differ from the defaults, as on the command line."""
    own, usual = asdict(cfg), asdict(EvidenceConfig())
    given = {key: value for key, value in own.items() if key not in ("ckpt_dir", "out", "dataset")}
    given = {key: value for key, value in given.items() if value != usual[key]}
    given |= {f"dataset.{key}": value for key, value in own["dataset"].items() if value != usual["dataset"][key]}
    return "".join(f" {key}={value}" for key, value in given.items())


def machine(cfg: EvidenceConfig) -> str:
    """Hardware and date."""
    import datetime

    import torch

    from ssdd.engine.provenance import processor

    return f"{cfg.jobs} cores of {processor()}, torch {torch.__version__}, float32, {datetime.date.today()}"


if __name__ == "__main__":
    sys.exit(main())
