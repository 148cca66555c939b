"""Kills come at the moments that are asked for, reach all processes, and are not mistaken for failures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kills import AtCall, AtOutput, Command, files, later_and_later, random_calls, random_times

PROGRAM = """
import os, sys, time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
if sys.argv[2:] == ["fail"]:
    sys.exit("it failed")
for number in range(20):
    path = folder / f"{rank}-{number}"
    if not path.exists():
        path.with_suffix(".tmp").write_text(str(number))
        os.replace(path.with_suffix(".tmp"), path)
        print("wrote", number)
    while os.environ.get("WORLD_SIZE") == "2" and not (folder / f"{1 - int(rank)}-{number}").exists():
        time.sleep(0.001)
"""


@pytest.fixture
def command(tmp_path: Path):
    """The program above, which writes twenty files below a folder, in one or two processes that wait for each other."""
    (tmp_path / "writer.py").write_text(PROGRAM)

    def make(name: str, *more: str, processes: int = 1) -> Command:
        (tmp_path / name).mkdir()
        return Command("writer", [str(tmp_path / name), *more], processes, folder=tmp_path)

    return make


def test_it_is_killed_later_and_later_until_it_ends(command, tmp_path):
    straight = command("straight").run()
    assert (straight.kills, straight.calls) == (0, 20) and straight.output.count("wrote") == 20
    outcome = command("killed").run(later_and_later(first=2, step=3))
    assert outcome.kills == 3  # 1, then 4, then 7 files; 8 are left
    assert files(tmp_path / "killed") == files(tmp_path / "straight")


def test_random_moments_belong_to_the_seed(command, tmp_path):
    assert random_times(0, 4, seconds=10.0) == random_times(0, 4, seconds=10.0) != random_times(1, 4, seconds=10.0)
    moments = random_calls(0, 4, calls=20)
    assert moments == random_calls(0, 4, calls=20) != random_calls(1, 4, calls=20)
    assert command("killed").run(moments).kills == 4
    assert len(files(tmp_path / "killed")) == 20


def test_of_two_processes_none_survives(command, tmp_path):
    killed = command("killed", processes=2)
    killed.kill(AtCall(8, rank=1))
    left = files(tmp_path / "killed")
    assert "1-6" in left and "1-7" not in left and "0-8" not in left
    assert killed.run().kills == 0
    assert len(files(tmp_path / "killed")) == 40


def test_a_moment_of_output_comes_after_the_line_and_not_before(command, tmp_path):
    command("killed", processes=2).kill(AtOutput("wrote 6"))
    assert {"0-5", "1-5"} <= set(files(tmp_path / "killed"))


def test_a_failure_is_not_taken_for_a_kill_and_an_end_is_not_either(command):
    with pytest.raises(AssertionError, match="it failed"):
        command("failing", "fail").run([AtCall(1)])
    with pytest.raises(AssertionError, match="it ended before"):
        command("ending").kill(AtCall(21))


def test_the_functions_to_die_at_may_be_methods(tmp_path):
    (tmp_path / "walker.py").write_text("import pathlib\nfor name in 'abc': (pathlib.Path.cwd() / name).touch()\n")
    Command("walker", [], folder=tmp_path).kill(AtCall(3, ("pathlib:Path.touch",)))
    assert {"a", "b"} < set(os.listdir(tmp_path)) and "c" not in os.listdir(tmp_path)
