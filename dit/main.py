"""`accelerate launch dit/main.py task=train|sample|evaluate key=value ...`, also as `python -m dit.main`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a path, Python puts dit/ first on sys.path, where its modules would shadow others
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(entry for entry in sys.path if Path(entry or ".").resolve() != root / "dit")]


def main(argv: list[str] | None = None) -> int:
    """Run the task that the arguments ask for; returns the exit status, 2 for errors that the user can mend."""
    from ssdd.engine.program import run_program

    return run_program(_run, argv)


def _run(argv: list[str]) -> None:
    from dit.config import DiTConfig
    from ssdd.engine.cli import parse
    from ssdd.engine.run import run_alone

    description = "Train, sample and evaluate class-conditional generators on a latent cache."
    cfg = parse(DiTConfig, argv, program="dit", description=description)
    if cfg.task == "train":
        from dit.tasks.train import run
    elif cfg.task == "sample":
        from dit.tasks.sample import run
    else:
        from dit.evaluation.evaluate import run
    if cfg.task == "train":
        run_alone(run, cfg)
    else:
        run(cfg)


if __name__ == "__main__":
    sys.exit(main())
