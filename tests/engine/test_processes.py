"""One process, or several that a launcher started: who they are, what they agree on, and what they exchange."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssdd.engine.errors import UserError
from ssdd.engine.processes import WORLD_SIZES, Processes, gradients_kept

ROOT = Path(__file__).resolve().parents[2]
BEST = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"

IN_EACH = """
import json
import torch
from ssdd.engine.errors import UserError
from ssdd.engine.interrupt import StopRequest
from ssdd.engine.processes import PATIENCE, Processes, gradients_kept

processes = Processes.join("cpu")
assert Processes.join("cpu").agree(lambda: 5) == 5
rank = processes.rank
for group in (processes.group or torch.distributed.group.WORLD, StopRequest()._group):
    assert group._get_backend(torch.device("cpu")).options._timeout == PATIENCE
result = {"rank": rank, "world": processes.world}
result["gathered"] = processes.gather(torch.tensor([[rank, 1]])).tolist()
result["uneven"] = processes.gather(torch.full((2 * rank, 1), rank)).tolist()
result["sum"] = processes.sum(torch.tensor([rank, 1])).tolist()
result["objects"] = processes.gather_objects({"of": rank})
result["mean"] = processes.mean(torch.tensor(float(rank))).item()
result["agreed"] = processes.agree(lambda: rank + 7)

def refuse():
    raise UserError("not like this")

try:
    processes.agree(refuse)
except UserError as error:
    result["refused"] = str(error)

weight = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.ones_(weight.weight)
model = processes.data_parallel(weight)
with gradients_kept(model, True):
    model(torch.tensor([[float(rank)]])).sum().backward()
result["kept"] = weight.weight.grad.item()
with gradients_kept(model, False):
    model(torch.tensor([[float(rank)]])).sum().backward()
result["exchanged"] = weight.weight.grad.item()
for turn in range(2):
    if rank == turn:
        print(json.dumps(result), flush=True)
    processes.wait()
"""


def test_alone_there_is_nothing_to_wait_for_and_everything_is_ones_own(monkeypatch):
    for name in WORLD_SIZES:
        monkeypatch.delenv(name, raising=False)
    alone = Processes.join()
    assert (alone.rank, alone.world, alone.device.type) == (0, 1, BEST) and alone.is_main
    assert Processes.join("cpu").device.type == "cpu"
    rows, module = torch.arange(3), torch.nn.Linear(1, 1)
    assert alone.gather(rows) is rows and alone.mean(rows) is rows and alone.sum(rows) is rows
    assert alone.data_parallel(module) is module
    assert alone.gather_objects("a") == ["a"] and alone.agree(lambda: 3) == 3
    with gradients_kept(module, True):
        alone.wait()
    with pytest.raises(UserError, match="^not here$"):
        alone.agree(_refuse)


def _refuse() -> None:
    raise UserError("not here")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_shards_parameters_is_refused_not_trained_wrongly(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"configured for {name}"):
        Processes.join()


def test_the_cpu_is_used_where_the_launcher_says_so_and_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert Processes.join().device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no usable GPU"):
        Processes.join("cuda")


def test_two_processes_agree_exchange_and_average(tmp_path):
    program = tmp_path / "in_each.py"
    program.write_text(IN_EACH)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    shared = {
        "world": 2,
        "gathered": [[0, 1], [1, 1]],
        "uneven": [[1], [1]],
        "sum": [1, 2],
        "objects": [{"of": 0}, {"of": 1}],
        "mean": 0.5,
        "agreed": 7,
        "refused": "not like this",
    }
    assert shared.items() <= first.items() and shared.items() <= second.items()
    assert (first["rank"], first["kept"], second["rank"], second["kept"]) == (0, 0.0, 1, 1.0)
    assert first["exchanged"] == second["exchanged"] == 1.0  # the mean of what both kept (0, 1) and saw since (0, 1)
