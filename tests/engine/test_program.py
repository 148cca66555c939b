"""What every command does around its work: one line and a status for a mistake, a full disk and an interrupt."""

from __future__ import annotations

import errno

import pytest

from ssdd.engine.errors import UserError
from ssdd.engine.program import named_paths, run_program


def raising(error: BaseException):
    def work(argv: list[str]) -> None:
        raise error

    return work


def test_the_status_is_that_of_the_work_and_0_for_none(capsys):
    assert run_program(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert run_program(lambda argv: None, []) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("x=1 is wrong: take x=2"), 2, "error: x=1 is wrong: take x=2\n"),
        (OSError(errno.ENOSPC, "No space left", "/tmp/a"), 2, "error: no space left on the disk at /tmp/a;"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, status, line):
    assert run_program(raising(error), []) == status
    printed = capsys.readouterr().err
    assert printed.startswith(line) and printed.count("\n") == 1


def test_a_defect_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_program(raising(KeyError("x")), [])


def test_paths_need_no_key_even_with_an_equals_sign_in_them(tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    words = ["folder", str(odd), "out=c", "--help"]
    assert named_paths(words) == (["folder", str(odd)], ["out=c", "--help"])
