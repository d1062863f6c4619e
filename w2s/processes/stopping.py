"""Asking a run to stop: what SIGTERM and Ctrl-C do, and what ends with it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from w2s.errors import StopRun

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Raise StopRun where a signal comes: nothing is under way that a checkpoint could keep."""
    stops: list[StopRun] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        stops.append(StopRun(f"stopped by {name}: repeat the command to resume", signum))
        raise stops[-1]

    with _handling(stop):
        try:
            yield
        except Exception as error:
            # Libraries that were at work then may have made an error of their own of it.
            if stops and not isinstance(error, StopRun):
                raise stops[-1] from error
            raise


@contextmanager
def stop_when_ready() -> Iterator[list[int]]:
    """Collect the signals that come, so that a step can end and be saved."""
    signals: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)

    with _handling(note):
        yield signals


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Let the processes that are started inside inherit that signals which stop the run are blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


def end_with_parent() -> None:
    """Let this process end as soon as the one that asked for it has, be it killed."""
    _after_parent(lambda: os._exit(1))


def stop_with_parent() -> None:
    """Let this process be asked to stop (SIGINT) as soon as the one that asked for it has ended, be it killed."""
    _after_parent(lambda: os.kill(os.getpid(), signal.SIGINT))


def _after_parent(act: Callable[[], None]) -> None:
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            act()

    threading.Thread(target=wait, daemon=True).start()
