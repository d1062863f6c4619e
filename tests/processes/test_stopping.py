"""What SIGTERM and Ctrl-C do."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import pytest

from w2s.errors import StopRun
from w2s.processes.stopping import SIGNALS, stop_at_once, stop_when_ready, stop_with_parent

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_steps_a_signal_stops_at_once(number: signal.Signals) -> None:
    with pytest.raises(StopRun, match=f"stopped by {number.name}") as caught, stop_at_once():
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number


def test_a_library_that_makes_an_error_of_its_own_of_the_stop_does_not_hide_it() -> None:
    with pytest.raises(StopRun, match="stopped by SIGTERM") as caught, stop_at_once():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            raise ValueError("cannot read the file") from error
    assert caught.value.exit_code == 143
    with pytest.raises(ValueError, match="without a signal"), stop_at_once():
        raise ValueError("without a signal")


def test_within_a_step_signals_are_noted_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_at_once():
        with stop_when_ready() as seen:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(StopRun):
            signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def _parent(told: Connection) -> None:
    begun, ready = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_child, args=(told, ready))
    child.start()
    begun.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def _child(told: Connection, ready: Connection) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    stop_with_parent()
    ready.send("")
    told.send(signal.sigwait(SIGNALS))


def test_a_process_is_asked_to_stop_when_the_one_that_started_it_was_killed() -> None:
    hears, told = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_parent, args=(told,))
    process.start()
    process.join()
    assert hears.poll(60) and hears.recv() == signal.SIGINT
