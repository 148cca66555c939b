"""`accelerate launch ssdd/main.py task=train|eval|z_stats|classifier key=value ...`, also as `python -m ssdd.main`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a path, Python puts ssdd/ first on sys.path, where its modules would shadow others
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(entry for entry in sys.path if Path(entry or ".").resolve() != root / "ssdd")]


def main(argv: list[str] | None = None) -> int:
    """Run the task that the arguments ask for; returns the exit status, 2 for errors that the user can mend."""
    from ssdd.engine.program import run_program

    return run_program(_run, argv)


def _run(argv: list[str]) -> None:
    import datetime
    from dataclasses import replace

    from ssdd.config import SSDDConfig
    from ssdd.engine.cli import parse
    from ssdd.engine.run import run_alone

    description = "Train, distil and evaluate an image tokenizer with a single-step diffusion decoder."
    cfg = parse(SSDDConfig, argv, program="ssdd", description=description)
    if cfg.run_name is None:
        cfg = replace(cfg, run_name=f"{cfg.task}-{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")
    if cfg.task == "train":
        from ssdd.tasks.train import run
    elif cfg.task == "eval":
        from ssdd.tasks.evaluate import run
    elif cfg.task == "z_stats":
        from ssdd.tasks.z_stats import run
    else:
        from ssdd.tasks.judge_training import run
    if cfg.task == "train":
        run_alone(run, cfg)
    else:
        run(cfg)


if __name__ == "__main__":
    sys.exit(main())
