"""Time and memory of a call on the CPU, each in a process of its own."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
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


def in_fresh_process(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `fn(*args)` from a new process, whose memory nothing has used before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(fn, *args, **kwargs).result()


def _resident(field: str) -> float:
    """A number of /proc/self/status (resident memory now, or at most) in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise KeyError(field)
