"""Run the chain from images to gFID: `python scripts/pipeline.py configs/pipelines/digits.yaml [key=value ...]`.

A stage is done when a record with the fingerprint of its command and of everything it reads lies in `stages/`; a second
run skips it. A stage that was interrupted continues if its fingerprint is still the same, else starts afresh. SIGTERM
and SIGUSR1 end the stage that runs, a training one after a checkpoint, and the pipeline with status 3.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

INTERRUPTED = 3
POLL_S = 0.1  # between looks at the memory of a stage


def main(argv: list[str] | None = None) -> int:
    """Run or continue the pipeline: 2 after an error that the user can mend, 3 when stopped, or a failed stage's."""
    from ssdd.engine.program import run_program

    return run_program(_run, argv)


def _run(argv: list[str]) -> int:
    from ssdd.engine.cli import parse
    from ssdd.engine.locks import Lock
    from ssdd.engine.precision import Precision
    from ssdd.engine.presets import configs_dir
    from ssdd.engine.processes import Processes
    from ssdd.images.sources import open_source
    from ssdd_pipeline.report.page import write_report
    from ssdd_pipeline.stages import PipelineConfig, build_stages

    argv = list(argv)
    if argv and "=" not in argv[0] and not argv[0].startswith("-"):
        path = Path(argv[0])
        path = path if path.is_file() else configs_dir() / "pipelines" / f"{path.stem}.yaml"
        argv[0] = f"preset={path}"
    cfg = parse(
        PipelineConfig, argv, program="pipeline",
        description="Images in, gFID with the several-step and the one-step decoder out. First argument: a "
        "pipeline's YAML file, such as configs/pipelines/digits.yaml.",
    )  # fmt: skip
    stages = build_stages(cfg)
    check_arguments(stages)
    Precision.resolve("auto", Processes.join().device)  # a precision that cannot be had must not cost finished stages
    lock_file = Path(cfg.ckpt_dir) / cfg.name / ".lock"
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock_file.touch()
    with Lock(lock_file, optional=True) as lock, StopSignals() as stop:
        lock.claim("another pipeline, or a stage left over from a killed one,")
        images = {split: open_source(cfg.dataset, split).fingerprint() for split in ("train", "val")}
        for number, stage in enumerate(stages, 1):
            status = run_stage(cfg, stage, images, stop, lock.hand_on(), f"[{number}/{len(stages)}] {stage.name}")
            if status != 0:
                return status
        print(write_report(cfg, stages))
    return 0


def check_arguments(stages: list[Any]) -> None:
    """Parse every stage's command line before the first one starts; UserError names the stage."""
    from ssdd.engine.cli import parse
    from ssdd.engine.errors import UserError
    from ssdd_pipeline.stages import PROGRAMS

    for stage in stages:
        program, schema = PROGRAMS[stage.module]
        arguments = [a for a in stage.arguments if "=" in a]
        try:
            parse(schema, arguments, program=program, description="")
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from None


class StopSignals:
    """Within its context, SIGTERM and SIGUSR1 end the stage that runs, and no further one starts."""

    def __init__(self) -> None:
        self.received = False
        self.process: int | None = None
        """The stage that runs."""

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._end_stage) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, process: int) -> None:
        """Pass signals on to `process`, including one received while it was being started."""
        self.process = process
        if self.received:
            os.kill(process, signal.SIGTERM)

    def _end_stage(self, *_: object) -> None:
        self.received = True
        if self.process is not None:
            os.kill(self.process, signal.SIGTERM)


def run_stage(cfg: Any, stage: Any, images: dict[str, str], stop: StopSignals, lock: int, title: str) -> int:
    """Run one stage unless it is done; its exit status. images: fingerprint of each split; lock: its descriptor."""
    from ssdd.engine.files import sha256_file
    from ssdd.engine.resumable import WorkRecord

    records = Path(cfg.ckpt_dir) / cfg.name / "stages"
    key = fingerprint(cfg, stage, images, records)
    done = WorkRecord(records / f"{stage.name}.json", {"key": key})
    started = WorkRecord(records / f"{stage.name}.started.json", {"key": key})
    if record := done.read():
        if all(Path(p).is_file() and sha256_file(p) == digest for p, digest in record["outputs"].items()):
            print(f"{title}: done before ({record['seconds']:.0f} s)", flush=True)
            return 0
        started.path.unlink(missing_ok=True)  # outputs were changed or deleted: make them again from the start
    done.path.unlink(missing_ok=True)
    seconds = started.begin(*stage.folders).get("seconds", 0.0)
    if stop.received:
        print(f"{title}: not started; the same command continues here", flush=True)
        return INTERRUPTED
    command = [sys.executable, "-m", stage.module, *stage.arguments]
    if cfg.processes > 1 and stage.parallel:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={cfg.processes}", "-m"]
        command = [sys.executable, "-m", *launcher, stage.module, *stage.arguments]
    print(f"{title}: {shlex.join(['python', *command[1:]])}", flush=True)
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (package_root(), environment.get("PYTHONPATH")) if p)
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds torchrun leaves for a last checkpoint
    if cfg.threads is not None:
        environment["OMP_NUM_THREADS"] = str(cfg.threads)
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, pass_fds=[lock])
    stop.watch(process.pid)
    peak = 0
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        peak = max(peak, largest_peak(process.pid))
        time.sleep(POLL_S)
    stop.process = None  # ended, but until now not free to be another's number
    _, wait_status, usage = os.wait4(process.pid, 0)
    status = process.returncode = os.waitstatus_to_exitcode(wait_status)
    seconds += time.perf_counter() - began
    if status != 0 or not all(path.is_file() for path in stage.outputs):
        started.write(seconds=seconds)
        if stop.received or status == 0:
            print(f"{title}: interrupted; the same command continues it", flush=True)
            return INTERRUPTED
        return 128 - status if status < 0 else status  # ended by a signal: as shells count
    outputs = {str(path): sha256_file(path) for path in stage.outputs}
    peak = peak or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    done.write(seconds=seconds, peak_memory_bytes=peak, outputs=outputs)
    print(f"{title}: {seconds:.0f} s, peak memory {peak / 2**30:.1f} GiB", flush=True)
    return 0


def largest_peak(process: int) -> int:
    """Peak memory in bytes of the largest among a process and its descendants, 0 where it is not recorded (not Linux).

    Asked while it runs: what `wait4` reports afterwards begins with the peak of this process, which started it.
    """
    from ssdd.engine.devices import resident_peak

    try:
        children = [int(n) for task in Path(f"/proc/{process}/task").iterdir() for n in children_of(task)]
    except OSError:  # not Linux, or it has just ended
        children = []
    return max([resident_peak(process), *(largest_peak(child) for child in children)])


def children_of(task: Path) -> list[str]:
    path = task / "children"
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def fingerprint(cfg: Any, stage: Any, images: dict[str, str], records: Path) -> str:
    """What the outcome of a stage depends on: command, threads, forced precision, images, outputs of earlier stages."""
    from ssdd.engine.files import read_json, sha256_json
    from ssdd.engine.precision import forced_precision

    forced = forced_precision()
    inputs = {name: read_json(records / f"{name}.json")["outputs"] for name in stage.inputs}
    return sha256_json(
        {
            "module": stage.module,
            "arguments": stage.decisive_arguments(),
            "threads": cfg.threads,
            "processes": cfg.processes,
            "inputs": {name: sorted(outputs.values()) for name, outputs in inputs.items()},
            "images": images if stage.reads_images else None,
            **({"precision": forced} if forced else {}),
        }
    )


def package_root() -> str:
    """The folder that `ssdd` is imported from, so that stages run the same code wherever they are started."""
    import ssdd

    return str(Path(ssdd.__file__).resolve().parents[1])


if __name__ == "__main__":
    sys.exit(main())
