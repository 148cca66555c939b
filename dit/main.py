"""`accelerate launch dit/main.py task=train|sample|evaluate key=value ...`, also as `python -m dit.main`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a path, Python puts dit/ first on sys.path, where its modules would shadow others
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(entry for entry in sys.path if Path(entry or ".").resolve() != root / "dit")]


def main(argv: list[str] | None = None) -> int:
    """Run the task that the arguments select; returns the exit status, 2 for errors that the user can correct."""
    from dit.config import DiTConfig
    from ssdd.engine.cli import parse
    from ssdd.engine.errors import UserError, full_disk
    from ssdd.engine.locale_independence import use_utf8

    if argv is None:
        use_utf8()
    try:
        cfg = parse(
            DiTConfig,
            sys.argv[1:] if argv is None else argv,
            program="dit",
            description="Train, sample and evaluate class-conditional generators on a latent cache.",
        )
        if cfg.task == "train":
            from dit.tasks.train import run
        elif cfg.task == "sample":
            from dit.tasks.sample import run
        else:
            from dit.evaluation.evaluate import run
        run(cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if (told := full_disk(error)) is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
