"""Signals become a question to the loop, and are signals again afterwards."""

from __future__ import annotations

import signal
import threading

import pytest

from ssdd.engine.interrupt import SIGNALS, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_stop_and_does_not_kill(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopRequest() as stop:
        assert not stop.agreed()
        signal.raise_signal(number)
        assert stop.agreed() and stop.agreed()
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_the_old_handlers_are_back_also_after_an_error():
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_thread_may_ask_although_it_cannot_handle_signals():
    answers = []

    def loop():
        with StopRequest() as stop:
            answers.append(stop.agreed())

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert answers == [False]
