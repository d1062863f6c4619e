"""Streams of a GPU that is not there: what one of them waits for holds up whoever waits for the stream."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from w2s.rehearsal.stand_ins.where import line
from w2s.rehearsal.tape import Tape, Wait


class Streams:
    """The streams of a rank's GPU. A tape is of the one that is current at first; others do next to nothing themselves.

    Args:
        tape: where it is noted that the GPU's own work waits for a call.

    Attributes:
        Stream: stands in for `torch.cuda.Stream`.
        Event: stands in for `torch.cuda.Event`.
        current: the stream that work is given to.
        replaced: calls, by number, in the place of which others are waited for.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self.Stream: type[_Stream] = type("Stream", (_Stream,), {"streams": self})
        self.Event: type[_Event] = type("Event", (_Event,), {"streams": self})
        self.current = self._first = self.Stream()
        self.replaced: dict[int, int] = {}

    @contextmanager
    def on(self, stream: "_Stream | None") -> Iterator[None]:
        """Inside, work is given to a stream; None leaves the current one."""
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def wait(self, calls: Mapping[int, int]) -> None:
        """Let the current stream continue when calls are done: the last one of each group, by the group's number."""
        if self.current is self._first:
            self._tape.events += [Wait(self.replaced.get(call, call), line()) for call in calls.values()]
        else:
            self.current.calls.update(calls)


class _Stream:
    """A CUDA stream.

    Attributes:
        calls: those that it waits for.
    """

    streams: Streams

    def __init__(self, *unused: Any, **unused_too: Any) -> None:
        self.calls: dict[int, int] = {}

    def wait_stream(self, stream: "_Stream") -> None:
        """Continue when another is done."""
        with self.streams.on(self):
            self.streams.wait(stream.calls)

    def wait_event(self, event: "_Event") -> None:
        """Continue when the event has come."""
        event.wait(self)

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        """Return an event that comes when all that was given to the stream is done."""
        event = event or self.streams.Event()
        event.record(self)
        return event


class _Event:
    """A CUDA event."""

    streams: Streams

    def __init__(self, *unused: Any, **unused_too: Any) -> None:
        self._calls: dict[int, int] = {}

    def record(self, stream: _Stream | None = None) -> None:
        """Come when all that was given to a stream is done."""
        self._calls = dict((stream or self.streams.current).calls)

    def wait(self, stream: _Stream | None = None) -> None:
        """Let a stream continue when the event has come."""
        with self.streams.on(stream):
            self.streams.wait(self._calls)

    query = elapsed_time = None
