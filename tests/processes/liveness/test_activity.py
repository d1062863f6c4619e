"""What is a sign of life, and what is none."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from w2s.processes.liveness.activity import Signs
from w2s.processes.liveness.heartbeat import READERS, Heartbeat


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def looks(signs: Signs, count: int = 1) -> int:
    """New signs in so many looks."""
    before = signs.count
    for _ in range(count):
        signs.look()
    return signs.count - before


def test_a_thread_lives_while_it_moves() -> None:
    turn, go_on = threading.Event(), threading.Event()

    def work() -> None:
        turn.wait()
        go_on.wait()

    thread = threading.Thread(target=work)
    thread.start()
    heartbeat = Heartbeat()
    signs = Signs(heartbeat, thread.ident or 0)
    looks(signs)
    assert looks(signs, 3) == 0
    heartbeat.at("training", 1)
    assert looks(signs, 3) == 1, "another phase"
    turn.set()
    while "go_on.wait()" not in signs.stack():
        time.sleep(0.001)
    assert looks(signs, 3) == 1, "another line"
    heartbeat.signals = [15]
    assert looks(signs, 3) == 1, "it has been asked to stop, and has time for that from now on"
    go_on.set()
    thread.join()


@pytest.fixture
def idle() -> Iterator[subprocess.Popen[str]]:
    """A process that waits, and echoes a line."""
    code = "while True: print(input(), flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def test_of_a_helper_that_is_waited_for_its_own_signs_count(idle: subprocess.Popen[str]) -> None:
    assert idle.stdin is not None and idle.stdout is not None
    heartbeat, clock = Heartbeat(), Clock()
    heartbeat.helpers[READERS] = lambda: [idle.pid]
    signs = Signs(heartbeat, threading.get_ident(), clock)
    looks(signs)
    assert looks(signs) == 1, "it is not waited for: this thread is at another line"
    heartbeat.at("waiting for samples", 1, awaits=READERS)
    _echo(idle)
    looks(signs)
    assert looks(signs, 2) == 0, "this thread moves, its helper does not"
    assert signs.helpers() == f"reading process {idle.pid} gives no sign of life"
    _echo(idle)
    assert looks(signs) == 1, "it has read and written"
    idle.kill()
    idle.wait()
    looks(signs)
    assert looks(signs) == 1, "it is dead: this thread counts again"
    assert signs.helpers() == ""


def _echo(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("line\n")
    process.stdin.flush()
    assert process.stdout.readline() == "line\n"
