"""Progress of a loop: a bar with the time left on a terminal, plain lines elsewhere, metrics to files."""

from __future__ import annotations

import secrets
import sys
import time
from typing import Any, TextIO

import numpy as np

from ssdd.engine.errors import UserError
from ssdd.engine.files import read_json, write_json
from ssdd.engine.png import save_png
from ssdd.engine.run import RunDirectory


class ProgressLog:
    """Reports a loop of ``total`` steps of which ``start`` were done before; other processes than the main are silent.

    With ``run``, :meth:`metrics` also appends to ``metrics.jsonl`` and to TensorBoard files in the run directory, and
    with ``wandb``, the name of a project, to Weights & Biases. Lines go to ``stream`` (default stderr). Use as a
    context manager, or :meth:`close`.
    """

    def __init__(
        self,
        total: int,
        *,
        description: str = "",
        run: RunDirectory | None = None,
        start: int = 0,
        main_process: bool = True,
        wandb: str | None = None,
        stream: TextIO | None = None,
    ):
        self.total, self.description = total, description
        self.done = start
        self._start, self._began = start, time.monotonic()
        self._main = main_process
        self._run = run if main_process else None
        self._stream = stream or sys.stderr
        self._bar = self._open_bar() if main_process and self._stream.isatty() else None
        self._board = self._open_board() if self._run is not None else None
        self._wandb = self._open_wandb(wandb) if self._run is not None and wandb else None

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` more as done."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(steps)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Record the scalars ``values`` of ``step`` in the files, and on the bar or as a line."""
        if not self._main:
            return
        if self._run is not None:
            self._run.append_metrics({"step": step, **values})
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        else:
            self._line(f"{self.position()}  " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 [H, W, 3] picture to ``pictures/<name>-<step>.png`` of the run; show it in TensorBoard."""
        if self._run is not None:
            save_png(self._run.pictures / f"{name}-{step:06d}.png", image)
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def message(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._main:
            self._line(text)

    def position(self) -> str:
        """Where the loop is, such as ``train 200/5000 (4 %), 3:20 left``."""
        share = f" ({100 * self.done // self.total} %)" if self.total else ""
        text = f"{self.description} {self.done}/{self.total}{share}".strip()
        new = self.done - self._start
        if new == 0:
            return text
        left = (time.monotonic() - self._began) / new * max(self.total - self.done, 0)
        return f"{text}, {format_seconds(left)} left"

    def close(self) -> None:
        """Finish the bar, the TensorBoard file and the upload."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._bar = self._board = self._wandb = None

    def __enter__(self) -> ProgressLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _open_bar(self) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            return None  # plain lines do as well
        return tqdm(
            total=self.total,
            initial=self._start,
            desc=self.description or None,
            unit="step",
            file=self._stream,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def _open_board(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tensorboard is not installed; run: pip install 'ssdd[train]'") from None
        # purge_step hides what a killed process logged after the checkpoint that this one resumes from.
        purge = self._start + 1 if self._start else None
        return SummaryWriter(str(self._run.tensorboard), purge_step=purge)

    def _open_wandb(self, project: str) -> Any:
        """The same run of the service whenever this run is continued: its id lies in the run directory."""
        try:
            import wandb
        except ImportError:
            raise UserError(f"training.wandb={project}: wandb is not installed; run: pip install wandb") from None
        file = self._run.path / "wandb.json"
        if not file.exists():
            write_json(file, {"id": secrets.token_hex(4)})
        folder, run_id = str(self._run.path), read_json(file)["id"]
        return wandb.init(project=project, name=self._run.name, id=run_id, resume="allow", dir=folder)


def format_seconds(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _is_number(value: Any) -> bool:
    return not isinstance(value, (str, bytes, list, tuple, dict)) and value is not None and np.ndim(value) == 0
