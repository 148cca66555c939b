"""The provenance of a measured figure: command, commit, date and machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def measured_by(device: torch.device | str) -> dict[str, str | None]:
    """{"command", "commit" (None outside a clone of this repository), "date" (UTC), "machine"} of this process."""
    return {
        "command": command(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(torch.device(device)),
    }


def command() -> str:
    """The command line of this process, with programs of this repository relative to its root."""
    program = Path(sys.argv[0]).resolve()
    name = str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else sys.argv[0]
    return shlex.join(["python", name, *sys.argv[1:]])


def commit() -> str | None:
    """The commit of the code, with "-dirty" when tracked files differ from it; None where there is no clone or git."""
    if not (ROOT / ".git").exists():  # an installed package may lie inside another repository
        return None
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return (
            subprocess.run(describe, check=True, capture_output=True, encoding="utf-8", timeout=30).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None


def machine(device: torch.device) -> str:
    """Processes, the device's name, threads of a process on a CPU, and torch's version."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()} ({torch.get_num_threads()} threads)"
    return f"{processes} x {name}, torch {torch.__version__}"


def processor() -> str:
    """The processor's name as recorded by Linux, elsewhere by Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
