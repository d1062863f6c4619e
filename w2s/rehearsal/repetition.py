"""Work that does what other work has done: its calls, seconds and bytes are repeated, and it is not run again."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from w2s.megatron.parallel import pipeline_schedule
from w2s.rehearsal.stand_ins.fake_group import Recorder
from w2s.rehearsal.stand_ins.meter import Meter, Rise
from w2s.rehearsal.tape import Call, Compute, Event, Wait


@dataclass(frozen=True)
class _Form:
    """What a result looks like."""

    shape: torch.Size
    dtype: torch.dtype
    on_gpu: bool


@dataclass(frozen=True)
class Done:
    """What some work did."""

    events: list[Event]
    rise: Rise
    results: list[_Form]
    stays: Counter[str]
    """Bytes beside the results that stay allocated, by part of the step."""

    @property
    def calls(self) -> list[int]:
        """The numbers of its calls, one after the other."""
        return [event.number for event in self.events if isinstance(event, Call)]


class Repetition:
    """Notes work, and repeats it."""

    def __init__(self, recorder: Recorder, meter: Meter) -> None:
        self._recorder, self._meter, self._tape = recorder, meter, recorder.tape

    def watch(self) -> Callable[[Sequence[Tensor]], Done]:
        """Begin to note what is done; what is returned ends it, and takes the results."""
        before, self._tape.events = self._tape.events, []
        rose = self._meter.watch()

        def end(results: Sequence[Tensor]) -> Done:
            events, self._tape.events = self._tape.events, before
            self._add(events)
            rise, stays = rose()
            forms = []
            for result in results:
                held = self._meter.of(result)
                stays.subtract(held)
                forms.append(_Form(result.shape, result.dtype, on_gpu=bool(held)))
            return Done(events, rise, forms, stays)

        return end

    def repeat(self, done: Done) -> tuple[list[Tensor], list[Tensor]]:
        """Do again what was done; return its results, and what stays allocated beside them.

        What waited for a call from before the work waits for the one that was as long ago.
        """
        self._meter.rise(done.rise)
        again = [self._recorder.next_number() for _ in done.calls]
        later = again[0] - done.calls[0] if again else 0
        self._add([_moved(event, later) for event in done.events])
        return [self._made(form) for form in done.results], self._meter.hold(done.stays)

    def redirect_waits(self, done: Done) -> None:
        """Let what waits for a call of some work from now on wait for the same call of its last repetition."""
        again = range(self._recorder.last_number - len(done.calls) + 1, self._recorder.last_number + 1)
        self._recorder.streams.replaced.update(zip(done.calls, again, strict=True))

    def _made(self, form: _Form) -> Tensor:
        if form.on_gpu:
            return self._meter.new(form.shape, form.dtype)
        return torch.empty(form.shape, dtype=form.dtype)

    def _add(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Compute):
                self._tape.compute(event.part, event.seconds)
            else:
                self._tape.events.append(event)


@contextmanager
def passes_through(shortened: Callable[..., Any]) -> Iterator[None]:
    """Inside, `shortened` is given each pass of Megatron's schedules, to run it: the pass and its named arguments."""
    choose = pipeline_schedule.get_forward_backward_func
    with mock.patch.object(pipeline_schedule, "get_forward_backward_func", lambda: partial(shortened, choose())):
        yield


def _moved(event: Event, later: int) -> Event:
    if isinstance(event, Call):
        return replace(event, number=event.number + later)
    return replace(event, call=event.call + later) if isinstance(event, Wait) else event
