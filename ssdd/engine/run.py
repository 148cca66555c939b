"""The directory of one run: resolved config, metrics, pictures, checkpoints, result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssdd.engine.errors import UserError
from ssdd.engine.files import plain, read_json, write_atomic, write_json
from ssdd.engine.locks import Lock


class RunDirectory:
    """``<ckpt_dir>/jobs/<run_name>``; only the main process writes.

    Nothing is created before something is written, but for the folder itself, which `claimed` needs.
    """

    def __init__(self, ckpt_dir: str | os.PathLike[str], run_name: str):
        if not run_name or run_name.startswith(".") or set(run_name) & set("/\\@") or run_name.isspace():
            raise UserError(f"run_name={run_name!r}: must not be empty, start with a dot, or contain / \\ or @")
        self.name = run_name
        self.path = Path(ckpt_dir).expanduser() / "jobs" / run_name
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last"
        self.pictures = self.path / "pictures"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "task_result.json"

    @contextmanager
    def claimed(self, is_main: bool) -> Iterator[None]:
        """Hold the lock of this run, which two programs must not train at a time; waits, and says so, for another one.

        The main process holds it for all. On a file system without locks there is none.
        """
        if not is_main:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with Lock(self.path, optional=True) as lock:
            lock.claim("another training")
            yield

    def save_config(self, cfg: Any) -> None:
        """Write the resolved config dataclass to ``config.yaml``."""
        from ssdd.engine.schema import to_yaml

        write_atomic(self.path / "config.yaml", to_yaml(cfg))

    def finished(self, cfg: Any, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a training that has ended with this very config; None where something may be left to do.

        identity: what is known before anything is built of what its last checkpoint must have been made of.
        """
        from ssdd.engine.checkpoint import load_state

        result = self.training_result()
        if result is None or not self._has_config(cfg):
            return None
        state = load_state(self.last)
        wanted = plain(identity)
        if state is None or any(state["identity"].get(key) != value for key, value in wanted.items()):
            return None
        print(f"{self.path} is finished: raise its steps to go on, or choose another run_name", flush=True)
        return result

    def _has_config(self, cfg: Any) -> bool:
        """Whether `config.yaml` holds this config, be it under other names of its keys."""
        from ssdd.engine.cli import read_config
        from ssdd.engine.schema import to_yaml

        file = self.path / "config.yaml"
        try:
            return file.is_file() and to_yaml(read_config(type(cfg), file)) == to_yaml(cfg)
        except UserError:  # of another version, with other keys
            return False

    def training_result(self) -> dict[str, Any] | None:
        """What a training has written to ``task_result.json``; None where it has not, or another task has."""
        result = read_json(self.result) if self.result.is_file() else {}
        return result if result.get("task") == "train" else None

    def begin(self, cfg: Any, step: int) -> None:
        """A run with this config goes on after `step` steps: what was written of later ones goes."""
        self.result.unlink(missing_ok=True)  # first: beside the new config, it would be taken for this run's
        self.truncate_metrics(step)
        self.save_config(cfg)

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add one line, a JSON object (with its ``step``), to ``metrics.jsonl``; NaN and infinity become null."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.metrics, "a+b") as file:
            if file.tell() > 0:  # opened at the end: a killed writer may have left half a line
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(plain(values), allow_nan=False).encode() + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; half a line that a killed process left is passed over."""
        if not self.metrics.is_file():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines whose step is greater than ``step``: what a resumed run is about to do again."""
        if not self.metrics.is_file():
            return
        kept = [row for row in self.read_metrics() if row.get("step", 0) <= step]
        write_atomic(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def write_result(self, obj: Any) -> None:
        """Write ``task_result.json``."""
        write_json(self.result, obj)


def run_alone(run: Callable[[Any], Any], cfg: Any) -> None:
    """run(cfg), a training, as the only one of its run; a dry run writes nothing and waits for none."""
    from ssdd.engine.processes import Processes

    if cfg.dry_run:
        run(cfg)
        return
    with RunDirectory(cfg.ckpt_dir, cfg.run_name).claimed(Processes.join().is_main):
        run(cfg)
