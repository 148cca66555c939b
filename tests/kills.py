"""Work that is killed at a chosen moment, and started again until it ends.

    command = Command("latent_cache", ["build", ...])
    straight = command.run()                                # to its end, in one go
    outcome = command.run(random_calls(0, 20, straight.calls))
    assert outcome.kills > 10 and files(killed) == files(straight)

A command has a process of its own, which imports what the command needs once and forks for every start.
The tests of killed work have `killed` in their names: `scripts/test --all -k killed`.
"""

from __future__ import annotations

import functools
import importlib
import json
import mmap
import os
import pickle
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DURABLE = ("os:fsync", "os:replace")
"""Functions that make work last: between two calls of them nothing durable happens."""


@dataclass(frozen=True)
class AtCall:
    """A process kills itself in place of the `number`-th call, from 1, of any of `functions` ("module:name").

    rank: which of several processes; the others are killed as soon as it is dead.
    """

    number: int
    functions: tuple[str, ...] = DURABLE
    rank: int = 0


@dataclass(frozen=True)
class AtOutput:
    """All processes are killed `delay` seconds after what they printed matches `pattern`; "" matches at the start."""

    pattern: str
    delay: float = 0.0


Moment = AtCall | AtOutput


def later_and_later(first: int, step: int) -> list[AtCall]:
    """Moments for a command that ends between two of them: each start gets `step` durable calls further."""
    return [AtCall(first + step * start) for start in range(100)]


def random_calls(seed: int, number: int, calls: int) -> list[AtCall]:
    """`number` moments for a command that makes `calls` durable calls; most of them come before it ends."""
    draw = random.Random(seed)
    return [AtCall(draw.randint(1, max(1, 8 * calls // (5 * number)))) for _ in range(number)]


def random_times(seed: int, number: int, seconds: float) -> list[AtOutput]:
    """`number` moments for a command that takes so many seconds; all of them come before it ends."""
    draw = random.Random(seed)
    return [AtOutput("", draw.uniform(0, 0.8 * seconds / number)) for _ in range(number)]


class Outcome(NamedTuple):
    """kills: how many. Of the last start: durable calls by process 0, seconds, and what was printed."""

    kills: int
    calls: int
    seconds: float
    output: str


@dataclass(frozen=True)
class Command:
    """`python -m PROGRAM ARGUMENTS`, or `python PROGRAM.py ARGUMENTS`, in so many processes.

    imports: modules that it imports late, and that need not be imported anew for every start.
    """

    program: str
    arguments: list[str]
    processes: int = 1
    imports: tuple[str, ...] = ()
    folder: Path = ROOT
    environment: dict[str, str] = field(default_factory=lambda: {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})

    def run(self, moments: Iterable[Moment] = ()) -> Outcome:
        """Kill it at the first of `moments`, start it again, kill it at the second, ..., and then let it end.

        It may end before all moments have come. AssertionError with all that it printed if it fails.
        """
        return self._run([*moments, None])

    def kill(self, moment: Moment) -> None:
        """Start it and kill it at `moment`. AssertionError if it fails, or ends before."""
        outcome = self._run([moment])
        assert outcome.kills == 1, f"it ended before {moment}:\n{outcome.output}"

    def _run(self, moments: list[Moment | None]) -> Outcome:
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}", **self.environment}
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "output"
            ended = subprocess.run(
                [sys.executable, "-c", "from tests.kills import serve; serve()", str(log)],
                cwd=self.folder,
                env=os.environ | environment,
                input=pickle.dumps((self, moments)),
                capture_output=True,
            )
            output = _text(log) if log.exists() else ""
        assert ended.returncode == 0, output + ended.stderr.decode(errors="replace")
        return Outcome(**json.loads(ended.stdout), output=output)

    def _work(self) -> None:
        sys.argv[1:] = self.arguments
        if self.program.endswith(".py"):
            sys.path.insert(0, str(Path(self.program).resolve().parent))
            runpy.run_path(self.program, run_name="__main__")
        else:
            runpy.run_module(self.program, run_name="__main__", alter_sys=True)


def serve() -> None:
    """Program of the process that starts a command again and again; its argument is the file for what is printed."""
    command, moments = pickle.load(sys.stdin.buffer)
    for name in command.imports:
        importlib.import_module(name)
    kills, log = 0, Path(sys.argv[1])
    for moment in moments:
        log.write_bytes(b"")
        began = time.monotonic()
        killed, calls = start(command._work, moment, command.processes, log)
        if not killed:
            break
        kills += 1
    print(json.dumps({"kills": kills, "calls": calls, "seconds": time.monotonic() - began}))


def start(
    work: Callable[[], object], moment: Moment | None = None, processes: int = 1, log: Path | None = None
) -> tuple[bool, int]:
    """Do `work` in forked processes until it ends or `moment` comes: (whether they were killed, number of calls).

    The calls are those that an AtCall counts, or else of durable functions by process 0. log: file for what is printed,
    which AtOutput needs. RuntimeError if a process fails.
    """
    counter = mmap.mmap(-1, 8)  # shared with the processes
    port = _free_port() if processes > 1 else 0
    children = [_fork(work, moment, (rank, processes, port), log, counter) for rank in range(processes)]
    ended: dict[int, int] = {}
    due: float | None = None
    try:
        while len(ended) < processes:
            for child in children:
                if child not in ended and (found := os.waitpid(child, os.WNOHANG))[0]:
                    ended[child] = os.waitstatus_to_exitcode(found[1])
            if isinstance(moment, AtOutput) and due is None and re.search(moment.pattern, _text(log), re.MULTILINE):
                due = time.monotonic() + moment.delay
            late = due is not None and time.monotonic() >= due and len(ended) < processes
            if moment is not None and (late or -signal.SIGKILL in ended.values()):
                return True, _count(counter)
            if any(ended.values()):
                raise RuntimeError(f"exit status {', '.join(map(str, ended.values()))}")
            time.sleep(0.01)
        return False, _count(counter)
    finally:
        for child in children:
            with suppress(ProcessLookupError):  # a group holds the workers of a process too
                os.killpg(child, signal.SIGKILL)
            if child not in ended:
                os.waitpid(child, 0)


def _fork(
    work: Callable[[], object],
    moment: Moment | None,
    place: tuple[int, int, int],
    log: Path | None,
    counter: mmap.mmap,
) -> int:
    """A child that does `work` as process `place` = (rank, of how many, port), in a group of its own; its id."""
    child = os.fork()
    if child:
        os.setpgid(child, child)
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        if log is not None:
            file = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
        rank, processes, port = place
        if processes > 1:  # as torchrun does
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in names.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        watched = moment if isinstance(moment, AtCall) else AtCall(0)  # which never comes
        if rank == watched.rank:
            _watch(watched, counter)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch(moment: AtCall, counter: mmap.mmap) -> None:
    """Count the calls of the moment's functions by this process, and kill it when the moment comes."""
    own = os.getpid()

    def watched(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: object, **options: object) -> object:
            if os.getpid() == own:  # and not a worker of it
                counter[:] = (_count(counter) + 1).to_bytes(8, "little")
                if _count(counter) == moment.number:
                    os.kill(own, signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in moment.functions:
        module, _, path = name.partition(":")
        *outer, last = path.split(".")
        owner = functools.reduce(getattr, outer, importlib.import_module(module))
        setattr(owner, last, watched(getattr(owner, last)))


def _count(counter: mmap.mmap) -> int:
    return int.from_bytes(counter[:], "little")


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def files(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
