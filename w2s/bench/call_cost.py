"""Time and memory of a call on the CPU, each in a process of its own."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from w2s.errors import W2SError

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What a call took."""

    seconds: float
    mib: float
    """Most memory at a time above what the process had before, in MiB."""


def cost(call: Callable[[], object]) -> Cost:
    """Call once. Only the first large call of a process can be measured: the peak is that of its whole life (Linux)."""
    before = _resident("VmRSS")
    start = time.perf_counter()
    call()
    return Cost(time.perf_counter() - start, _resident("VmHWM") - before)


def in_fresh_process(fn: Callable[..., T], *args: Any) -> T:
    """Return `fn(*args)` from a new process, whose memory nothing has used before.

    Raises:
        W2SError: the process failed (its traceback is on stderr) or was killed.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, fn, args), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        reason = "killed, out of memory?" if process.exitcode == -signal.SIGKILL else f"exit code {process.exitcode}"
        raise W2SError(f"the process of {fn.__name__}{args} ended without a result: {reason}") from None


def _send(sender: Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    sender.send(fn(*args))


def _resident(field: str) -> float:
    """A number of /proc/self/status (resident memory now, or at most) in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise KeyError(field)
