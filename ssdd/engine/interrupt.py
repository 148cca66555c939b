"""Stopping on request: SIGTERM and SIGUSR1 as a decision that all processes of a run share."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist

from ssdd.engine.processes import PATIENCE

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Within its context, SIGTERM and SIGUSR1 do not kill but request the loop to checkpoint and end.

    Every process calls `agreed()` once per step. It is true in all processes at the same step, whichever of them got
    the signal: the answer is the one that was reduced, on the CPU, while the step before was running.
    """

    def __init__(self) -> None:
        self.signalled = False
        self._previous: dict[int, object] = {}
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None
        parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if parallel else None

    def agreed(self) -> bool:
        """Whether to stop now."""
        if self._group is None:
            return self.signalled
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._flag.item())
        self._flag = torch.tensor([int(self.signalled)], dtype=torch.int32)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
