"""Where the time of a step goes: marks on a clock, each of which ends one part and begins another."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

REST = "rest"
"""The part of a step that no other part covers."""


class Parts:
    """Knows the innermost part of a step that is open."""

    def __init__(self) -> None:
        self._open: list[str] = [REST]

    @property
    def innermost(self) -> str:
        """The innermost part that is open."""
        return self._open[-1]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """Open a part inside of the one that is open."""
        self._open.append(name)

    def end(self) -> None:
        """Close the innermost part."""
        self._open.pop()


class Marks(Parts):
    """Gives every moment of a step to the innermost part that is open, so that the parts of a step add up to it.

    On a GPU the marks are CUDA events on the current stream: a part's time is that of its kernels and of the stream's
    waiting for the host, and the host waits for nothing before `read`. On a CPU they are readings of a clock.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._on_gpu = device.type == "cuda"
        self._clock: Callable[[], Any] = _event if self._on_gpu else time.perf_counter
        self._steps: list[list[tuple[str, Any]]] = []
        self._in_step = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step; nothing is measured outside of one."""
        self._steps.append([])
        self._open = [REST]  # a step that failed has left parts open
        self._in_step = True
        self._mark()
        try:
            yield
        finally:
            self._mark()
            self._in_step = False

    def begin(self, name: str) -> None:
        """Open a part inside of the one that is open."""
        super().begin(name)
        self._mark()

    def end(self) -> None:
        """Close the innermost part."""
        super().end()
        self._mark()

    def read(self) -> list[dict[str, float]]:
        """Return the milliseconds of each part of every step since the last reading."""
        if self._on_gpu:
            torch.cuda.synchronize()
        steps, self._steps = self._steps, []
        return [self._milliseconds(step) for step in steps]

    def _mark(self) -> None:
        if self._in_step:
            self._steps[-1].append((self._open[-1], self._clock()))

    def _milliseconds(self, step: list[tuple[str, Any]]) -> dict[str, float]:
        parts: dict[str, float] = {}
        for (name, begun), (_, ended) in pairwise(step):
            span = begun.elapsed_time(ended) if self._on_gpu else 1e3 * (ended - begun)
            parts[name] = parts.get(name, 0.0) + span
        return parts


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
