"""A lock on a file ends with its block or its process, whatever has been forked inside it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ssdd.engine.locks import Lock, locked

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, signal, sys
from pathlib import Path
from ssdd.engine.locks import locked

with locked(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    signal.pause()
"""
LEAVER = """
import os, sys
from pathlib import Path
from ssdd.engine.locks import locked

with locked(Path(sys.argv[1])):
    child = os.fork()
if child == 0:
    with locked(Path(sys.argv[1])):
        os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def is_free(path: Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "file"
    path.touch()
    return path


def test_a_lock_keeps_others_out_until_its_block_ends_however_it_ends(file):
    with pytest.raises(ValueError, match="inside"), locked(file):
        assert not is_free(file)
        raise ValueError("inside")
    assert is_free(file)


def test_where_files_have_no_locks_nothing_stays_open(file, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    closed, close = [], os.close
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor)))
    with pytest.raises(OSError, match="No locks available"), locked(file):
        pass
    assert len(closed) == 1


def test_a_process_forked_inside_the_block_neither_holds_the_lock_nor_ends_it(file):
    with locked(file):
        child = os.fork()
        if child == 0:
            signal.pause()
        assert not is_free(file)
    try:
        assert is_free(file)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_process_forked_inside_the_block_can_leave_it_and_lock_again(file):
    subprocess.run([sys.executable, "-c", LEAVER, str(file)], cwd=ROOT, check=True, timeout=60)
    assert is_free(file)


def test_of_a_killed_holder_its_forked_processes_do_not_keep_the_lock(file):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        child = int(holder.stdout.readline())
        try:
            assert not is_free(file)
            holder.kill()
            holder.wait()
            assert is_free(file)
        finally:
            os.kill(child, signal.SIGKILL)


def test_who_waits_for_a_lock_is_told_and_gets_it(file, caplog):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        child = int(holder.stdout.readline())
        threading.Timer(0.3, holder.kill).start()
        try:
            with Lock(file) as lock:
                lock.claim("another test")
                assert f"another test holds the lock on {file}: waiting until it ends" in caplog.text
        finally:
            os.kill(child, signal.SIGKILL)


def test_what_is_shared_lets_in_who_shares_and_nobody_else(file):
    with Lock(file) as first, Lock(file) as second:
        first.claim()
        first.share()
        second.share()
        assert not is_free(file)
    assert is_free(file)


def test_where_a_lock_is_optional_work_goes_on_without(file, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Lock(file, optional=True) as lock:
        lock.claim()
        lock.share()


def test_a_program_that_a_lock_is_handed_on_to_holds_it_until_it_ends(file):
    with Lock(file) as lock:
        lock.claim()
        program = subprocess.Popen(["sleep", "60"], pass_fds=[lock.hand_on()])
    try:
        assert not is_free(file)
    finally:
        program.kill()
        program.wait()
    assert is_free(file)
