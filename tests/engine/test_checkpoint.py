"""Checkpoint folders, optimizer state, and references to weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from schedulefree import RAdamScheduleFree

from ssdd.engine import checkpoint
from ssdd.engine.errors import UserError

ROOT = Path(__file__).parents[2]


def weights(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((4,), value)}, "aux": {"v": torch.full((2, 2), -value), "n": torch.tensor(3)}}


def version(folder: Path) -> int:
    """Which save() a folder holds; all its parts must be of the same one."""
    tensors, state = checkpoint.load(folder)
    value = tensors["model"]["w"][0].item()
    assert (tensors["aux"]["v"] == -value).all()
    assert state["version"] == value
    return int(value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_saved_is_loaded_again_bit_for_bit(tmp_path):
    tensors = {
        "model": {
            "float": torch.randn(3, 5),
            "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "transposed": torch.randn(3, 5).t(),
            "bfloat16": torch.randn(7).bfloat16(),
            "bool": torch.tensor([True, False]),
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "nan": torch.tensor([float("nan"), float("-inf")]),
        },
        "nothing": {},
    }
    state = {"step": 7, "best": float("inf"), "lr": 0.1 + 0.2, "names": ["a"], "none": None, "nested": {"nan": 1e-320}}
    checkpoint.save(tmp_path / "c", tensors, state)
    loaded, loaded_state = checkpoint.load(tmp_path / "c")
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors["model"].items():
        assert loaded["model"][name].dtype == tensor.dtype
        assert torch.equal(loaded["model"][name].nan_to_num(), tensor.nan_to_num())
    assert loaded["nothing"] == {}


def test_tied_weights_are_written_under_both_names(tmp_path):
    shared = torch.randn(4)
    checkpoint.save_tensors(tmp_path / "t.safetensors", {"a": shared, "b": shared, "slice": shared[:2]})
    loaded = checkpoint.load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(loaded["a"], shared)
    assert torch.equal(loaded["b"], shared)
    assert torch.equal(loaded["slice"], shared[:2])


def test_equal_content_gives_equal_bytes_whatever_the_order_of_the_metadata(tmp_path):
    metadata = {f"key{i}": f'"välue" {i}\n' for i in range(8)}
    files = []
    for i in range(4):
        checkpoint.save(tmp_path / str(i), weights(1), {"step": 1}, dict(sorted(metadata.items(), reverse=i % 2 == 0)))
        files.append(contents(tmp_path / str(i)))
    assert all(file == files[0] for file in files)
    with safe_open(tmp_path / "0" / "model.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_saved_files_can_be_read_by_other_users_as_the_umask_says(tmp_path):
    checkpoint.save(tmp_path / "c", weights(1), {})
    (tmp_path / "ordinary").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "c").iterdir()}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}


def test_saving_again_replaces_the_whole_folder(tmp_path):
    checkpoint.save(tmp_path / "c", {**weights(1), "gone": {"x": torch.ones(1)}}, {"version": 1})
    checkpoint.save(tmp_path / "c", weights(2), {"version": 2})
    assert version(tmp_path / "c") == 2
    assert sorted(contents(tmp_path / "c")) == ["aux.safetensors", "model.safetensors", "state.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_missing_or_damaged_checkpoint_is_a_user_error(tmp_path):
    assert not checkpoint.exists(tmp_path / "none")
    with pytest.raises(UserError, match="none: no complete checkpoint"):
        checkpoint.load(tmp_path / "none")
    checkpoint.save(tmp_path / "c", weights(1), {"version": 1})
    os.truncate(tmp_path / "c" / "aux.safetensors", 20)
    with pytest.raises(UserError, match="aux.safetensors: not a readable safetensors file"):
        checkpoint.load(tmp_path / "c")
    (tmp_path / "c" / "state.json").write_text("{")
    with pytest.raises(UserError, match="state.json: not valid JSON"):
        checkpoint.load(tmp_path / "c")


def intermediate(tmp_path: Path, *, folder: int | None, new: int | str | None, old: int | str | None) -> Path:
    """The three folders as a killed writer leaves them: a version, "part" (without state) or none."""
    for name, content in (("c", folder), ("c.new", new), ("c.old", old)):
        if content is not None:
            value = 0 if content == "part" else content
            checkpoint.save(tmp_path / "made", weights(value), {"version": value})
            (tmp_path / "made").rename(tmp_path / name)
            if content == "part":
                (tmp_path / name / "state.json").unlink()
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({"folder": 1, "new": "part", "old": None}, 1),  # while writing
        ({"folder": 1, "new": 2, "old": None}, 1),  # written, nothing renamed
        ({"folder": 1, "new": 2, "old": "part"}, 1),  # an older leftover half deleted
        ({"folder": None, "new": 2, "old": 1}, 2),  # between the two renames
        ({"folder": 2, "new": None, "old": 1}, 2),  # renamed, the old one still there
        ({"folder": 2, "new": None, "old": "part"}, 2),  # the old one half deleted
        ({"folder": None, "new": 1, "old": None}, 1),  # the first save, before its rename
    ],
)
def test_every_state_that_a_killed_writer_leaves_can_be_read_and_written_over(tmp_path, left, expected):
    folder = intermediate(tmp_path, **left)
    assert checkpoint.exists(folder)
    assert version(folder) == expected
    checkpoint.save(folder, weights(7), {"version": 7})
    assert version(folder) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_first_save_killed_while_writing_leaves_no_checkpoint(tmp_path):
    folder = intermediate(tmp_path, folder=None, new="part", old=None)
    assert not checkpoint.exists(folder)
    checkpoint.save(folder, weights(1), {"version": 1})
    assert version(folder) == 1


KILLED_AT_CALL = """
import os, shutil, signal, sys
import torch
from ssdd.engine import checkpoint

calls = 0

def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for name in ("rename", "replace", "fsync", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
folder = sys.argv[1]
for fatal in range(1, 100):
    calls = 0
    child = os.fork()
    if child == 0:
        tensors = {"model": {"w": torch.full((4,), float(fatal))}, "aux": {"v": torch.full((2, 2), -float(fatal))}}
        checkpoint.save(folder, tensors, {"version": fatal})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    tensors, state = checkpoint.load(folder)
    print(int(os.WIFSIGNALED(status)), state["version"], int(tensors["model"]["w"][0]), int(-tensors["aux"]["v"][0, 0]))
    if not os.WIFSIGNALED(status):
        break
"""


def test_a_writer_killed_at_any_system_call_loses_at_most_its_own_version(tmp_path):
    checkpoint.save(tmp_path / "c", weights(0), {"version": 0})
    program = [sys.executable, "-c", KILLED_AT_CALL, str(tmp_path / "c")]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    previous, kills = 0, 0
    for attempt, line in enumerate(done.stdout.splitlines(), start=1):
        killed, *versions = map(int, line.split())
        assert len(set(versions)) == 1, "parts of different versions"
        assert versions[0] in (previous, attempt)
        previous = versions[0]
        kills += killed
    assert previous == attempt, "the last save was not killed"
    assert kills >= 8


def test_a_linked_checkpoint_is_another_name_of_the_same_files_and_outlives_the_first(tmp_path):
    checkpoint.save(tmp_path / "a", weights(1), {"version": 1})
    before = contents(tmp_path / "a")
    checkpoint.save(tmp_path / "b", weights(0), {"version": 0})
    checkpoint.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").samefile(tmp_path / "b" / "model.safetensors")
    checkpoint.save(tmp_path / "a", weights(2), {"version": 2})
    assert (version(tmp_path / "a"), version(tmp_path / "b")) == (2, 1)
    assert contents(tmp_path / "b") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(tmp_path / "a", weights(1), {"version": 1})
    checkpoint.link(tmp_path / "a", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_newest_steps_are_kept_by_number_and_no_other_folder_is_touched(tmp_path):
    names = ["last", "best", "step-notes", *map(checkpoint.step_name, (5, 40, 999_999, 1_000_000))]
    for name in names:
        checkpoint.save(tmp_path / name, weights(1), {"version": 1})
    checkpoint.keep_newest(tmp_path, 2)
    kept = {"last", "best", "step-notes", "step-999999", "step-1000000"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    checkpoint.keep_newest(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == kept


WRITER = """
import sys
import torch
from ssdd.engine import checkpoint

for value in range(1, 100_000):
    tensors = {"model": {"w": torch.full((4,), float(value))}, "aux": {"v": torch.full((2, 2), -float(value))}}
    checkpoint.save(sys.argv[1], tensors, {"version": value})
"""


def test_a_reader_beside_a_writer_always_sees_one_whole_version(tmp_path):
    checkpoint.save(tmp_path / "c", weights(0), {"version": 0})
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "c")], cwd=ROOT)
    try:
        seen = [0]
        while len(set(seen)) < 20:
            assert writer.poll() is None, "the writer failed"
            seen.append(version(tmp_path / "c"))
    finally:
        writer.kill()
        writer.wait()
    assert seen == sorted(seen)


def network(channels_last: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 4, 2))
    return net.to(memory_format=torch.channels_last) if channels_last else net


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()


def adamw(net: torch.nn.Module) -> torch.optim.Optimizer:
    first, *others = net.parameters()
    groups = [{"params": [first], "weight_decay": 0.0}, {"params": others, "lr": torch.tensor(3e-3)}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95), foreach=False)


def adamw_plain(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-3, amsgrad=True)


def schedule_free(net: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = RAdamScheduleFree(net.parameters(), lr=2.5e-3, weight_decay=1e-2)
    optimizer.train()
    return optimizer


def assert_same(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("build", [adamw, adamw_plain, schedule_free])
def test_a_resumed_optimizer_takes_the_same_steps_bit_for_bit(tmp_path, build, channels_last):
    net = network(channels_last)
    optimizer = build(net)
    train(net, optimizer, range(8))
    tensors, values = checkpoint.optimizer_tensors(optimizer)
    checkpoint.save(tmp_path / "c", {"model": net.state_dict(), "optimizer": tensors}, {"optimizer": values})

    resumed = network(channels_last)
    resumed_optimizer = build(resumed)
    saved, state = checkpoint.load(tmp_path / "c")
    resumed.load_state_dict(saved["model"])
    checkpoint.load_optimizer(resumed_optimizer, saved["optimizer"], state["optimizer"])
    assert_same(resumed_optimizer.state_dict(), optimizer.state_dict())

    train(net, optimizer, range(8, 14))
    train(resumed, resumed_optimizer, range(8, 14))
    assert_same(dict(resumed.state_dict()), dict(net.state_dict()))
    assert_same(resumed_optimizer.state_dict(), optimizer.state_dict())


def test_an_optimizer_that_made_no_step_or_skipped_a_parameter_round_trips():
    net = network()
    optimizer = schedule_free(net)
    fresh = schedule_free(network())
    checkpoint.load_optimizer(fresh, *checkpoint.optimizer_tensors(optimizer))
    assert_same(fresh.state_dict(), optimizer.state_dict())
    net[0].requires_grad_(False)
    train(net, optimizer, range(2))
    checkpoint.load_optimizer(fresh, *checkpoint.optimizer_tensors(optimizer))
    assert_same(fresh.state_dict(), optimizer.state_dict())


def test_state_of_another_dtype_than_its_parameter_and_python_scalars_are_kept():
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.state[parameter] = {
        "momentum_buffer": torch.randn(5) / 3,
        "count": 4,
        "scale": 0.1,
        "factor": torch.ones(2),
    }
    other = torch.optim.SGD([parameter], lr=0.2, momentum=0.5)
    checkpoint.load_optimizer(other, *checkpoint.optimizer_tensors(optimizer))
    assert_same(other.state_dict(), optimizer.state_dict())


def test_the_state_of_another_model_is_refused():
    saved = checkpoint.optimizer_tensors(adamw_plain(network()))
    with pytest.raises(UserError, match=r"groups of \[4\] tensors.*groups of \[1, 3\]"):
        checkpoint.load_optimizer(adamw(network()), *saved)
    net = torch.nn.Linear(2, 3)
    optimizer = adamw_plain(net)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for other in (torch.nn.Linear(3, 2), torch.nn.Linear(2, 4)):
        with pytest.raises(UserError, match="belongs to another model"):
            checkpoint.load_optimizer(adamw_plain(other), *checkpoint.optimizer_tensors(optimizer))


@pytest.fixture
def runs(tmp_path) -> Path:
    """A ckpt_dir with the run "full" (last with EMA, best without) and the run "begun" (no checkpoint yet)."""
    tensors = weights(1)["model"]
    checkpoints = tmp_path / "runs" / "jobs" / "full" / "checkpoints"
    checkpoint.save(checkpoints / "last", {"model": tensors, "model_ema": tensors, "optimizer": {}}, {})
    checkpoint.save(checkpoints / "best", {"model": tensors}, {})
    (tmp_path / "runs" / "jobs" / "begun").mkdir()
    return tmp_path / "runs"


def test_a_run_name_means_the_averaged_weights_of_its_last_checkpoint(runs):
    checkpoints = runs / "jobs" / "full" / "checkpoints"
    assert checkpoint.resolve("full", runs) == checkpoints / "last" / "model_ema.safetensors"
    assert checkpoint.resolve("full@last", str(runs)) == checkpoints / "last" / "model_ema.safetensors"
    assert checkpoint.resolve("full@best", runs) == checkpoints / "best" / "model.safetensors"


def test_a_directory_or_a_file_may_be_named(runs, monkeypatch):
    folder = runs / "jobs" / "full"
    expected = folder / "checkpoints" / "last" / "model_ema.safetensors"
    assert checkpoint.resolve(str(folder), runs) == expected
    assert checkpoint.resolve(str(folder / "checkpoints" / "last"), "elsewhere") == expected
    assert checkpoint.resolve(str(expected), "elsewhere") == expected
    monkeypatch.chdir(expected.parent)
    assert checkpoint.resolve("model.safetensors", "elsewhere") == Path("model.safetensors")
    monkeypatch.chdir(folder.parent)
    assert checkpoint.resolve("full", "elsewhere") == Path("full/checkpoints/last/model_ema.safetensors")


@pytest.mark.parametrize("averaged", ["model_ae_ema.safetensors", "model_1.safetensors"])
def test_in_official_folders_too_averaged_weights_are_preferred(tmp_path, averaged):
    for name in ("model.safetensors", averaged):
        checkpoint.save_tensors(tmp_path / "official" / name, {"w": torch.ones(1)})
    assert checkpoint.resolve(str(tmp_path / "official"), tmp_path).name == averaged


def test_a_run_whose_writer_was_killed_between_its_renames_is_found(runs):
    last = runs / "jobs" / "full" / "checkpoints" / "last"
    last.rename(last.with_name("last.old"))
    assert checkpoint.resolve("full", runs).parent.name == "last.old"
    shutil.copytree(last.with_name("last.old"), last.with_name("last.new"))
    assert checkpoint.resolve("full", runs).parent.name == "last.new"


def refusal(reference: str, runs: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.resolve(reference, runs)
    return str(caught.value)


def test_a_reference_to_nothing_lists_what_was_looked_for_and_what_there_is(runs):
    message = refusal("fulll", runs)
    assert str(runs / "jobs" / "fulll" / "checkpoints" / "last") in message
    assert "model_ema.safetensors" in message
    assert message.endswith("begun, full")
    assert refusal("full@first", runs).endswith("there is full@best, full@last")
    assert refusal("begun", runs).endswith("begun, full")
    assert str(runs / "no.safetensors") in refusal(str(runs / "no.safetensors"), runs)
    assert refusal("x", runs / "empty").endswith("none")
    (runs / "x.txt").write_bytes(b"")
    assert "not a weights file" in refusal(str(runs / "x.txt"), runs)
    assert "empty checkpoint reference" in refusal("", runs)
