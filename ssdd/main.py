"""`accelerate launch ssdd/main.py task=train|eval|z_stats|classifier key=value ...`, also as `python -m ssdd.main`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a path, Python puts ssdd/ first on sys.path, where its modules would shadow others
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(entry for entry in sys.path if Path(entry or ".").resolve() != root / "ssdd")]


def main(argv: list[str] | None = None) -> int:
    """Run the task that the arguments select; returns the exit status, 2 for errors that the user can correct."""
    import datetime

    from ssdd.config import SSDDConfig
    from ssdd.engine.cli import parse
    from ssdd.engine.errors import UserError, full_disk
    from ssdd.engine.locale_independence import use_utf8

    if argv is None:
        use_utf8()
    try:
        cfg = parse(
            SSDDConfig,
            sys.argv[1:] if argv is None else argv,
            program="ssdd",
            description="Train, distil and evaluate an image tokenizer with a single-step diffusion decoder.",
        )
        if cfg.run_name is None:
            cfg.run_name = f"{cfg.task}-{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
        if cfg.task == "train":
            from ssdd.tasks.train import run
        elif cfg.task == "eval":
            from ssdd.tasks.evaluate import run
        elif cfg.task == "z_stats":
            from ssdd.tasks.z_stats import run
        else:
            from ssdd.tasks.judge_training import run
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
