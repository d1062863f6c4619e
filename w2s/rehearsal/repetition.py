"""Micro-batches that do what another has done: the layers of three of a pass run, those of all others are repeated.

Weights wait to be gathered in the first micro-batch of a pass, and gradients are reduced in the last one. Those between
do the same to tensors of the same shapes, so that the second one's calls, work and bytes stand for them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from w2s.megatron.model.tower import TransformerBlock
from w2s.megatron.parallel import pipeline_schedule
from w2s.rehearsal.fake_group import Recorder
from w2s.rehearsal.meter import Meter, Rise
from w2s.rehearsal.tape import Call, Compute, Event, Wait


@dataclass
class _Pass:
    """What the layers of a chunk have done in a pass so far."""

    seen: int = 0
    """Micro-batches."""
    forward: "_Done | None" = None
    backward: "_Done | None" = None


@dataclass(frozen=True)
class _Done:
    """What layers do."""

    events: list[Event]
    rise: Rise
    stays: Counter[str]
    """Bytes beside the result that stay allocated, by part of the step."""
    counted: bool
    """Whether the result is on the GPU."""


class Repetition:
    """Lets layers of micro-batches repeat what others have done.

    Args:
        recorder: writes calls down.
        meter: counts bytes and work.
    """

    def __init__(self, recorder: Recorder, meter: Meter) -> None:
        self._recorder, self._meter, self._tape = recorder, meter, recorder.tape
        self._micro_batches = 0
        self._passes: dict[Any, _Pass] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, passes of Megatron's schedules are shortened."""
        choose, whole = pipeline_schedule.get_forward_backward_func, TransformerBlock.forward

        def passes() -> Callable[..., Any]:
            return partial(self._pass, choose())

        def forward(layers: Any, hidden: Any, *args: Any, **kwargs: Any) -> Tensor:
            return self._forward(partial(whole, layers), layers, hidden, args, kwargs)

        with (
            mock.patch.object(pipeline_schedule, "get_forward_backward_func", passes),
            mock.patch.object(TransformerBlock, "forward", forward),
        ):
            yield

    def _pass(self, run: Callable[..., Any], *, num_microbatches: int, **settings: Any) -> Any:
        self._micro_batches = num_microbatches
        try:
            return run(num_microbatches=num_microbatches, **settings)
        finally:
            self._micro_batches = 0
            self._passes.clear()

    def _forward(self, whole: Callable[..., Tensor], layers: Any, hidden: Any, args: Any, kwargs: Any) -> Tensor:
        entry: Tensor = hidden if layers.pre_process else layers.input_tensor
        done = self._passes.setdefault(layers, _Pass())
        number, done.seen = done.seen, done.seen + 1
        if number == 1 and self._micro_batches > 3:
            return self._watched(partial(whole, hidden, *args, **kwargs), entry, done)
        if done.forward is None or number == self._micro_batches - 1:
            return whole(hidden, *args, **kwargs)
        return _Repeated.apply(entry, self, done.forward, done)

    def _watched(self, whole: Callable[[], Tensor], entry: Tensor, done: _Pass) -> Tensor:
        """Run layers, and note what they do in both directions."""
        end = self._watch()
        result = whole()
        did = end(result)
        if result.requires_grad and not entry.requires_grad:
            return result  # no gradient says where the backward pass ends
        done.forward = did
        if not result.requires_grad:
            return result
        ends: list[Callable[[Tensor], _Done]] = []

        def begin(gradient: Tensor) -> None:
            ends.append(self._watch())

        def finish(gradient: Tensor) -> None:
            done.backward = ends.pop()(gradient)

        result.register_hook(begin)
        entry.register_hook(finish)
        return result

    def _watch(self) -> Callable[[Tensor], _Done]:
        """Begin to note what is done; the result ends it."""
        before, self._tape.events = self._tape.events, []
        rose = self._meter.watch()

        def end(result: Tensor) -> _Done:
            events, self._tape.events = self._tape.events, before
            self._add(events)
            rise, stays = rose()
            own = self._meter.of(result)
            stays.subtract(own)
            return _Done(events, rise, stays, bool(own))

        return end

    def repeat(self, done: _Done, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Do again what was done; return a result, and what stays allocated beside it.

        Args:
            done: what.
            like: has the shape and type of the result.
        """
        self._meter.rise(done.rise)
        numbers: dict[int, int] = {}
        again: list[Event] = []
        for event in done.events:
            if isinstance(event, Call):
                numbers[event.number] = self._recorder.next_number()
                event = replace(event, number=numbers[event.number])
            elif isinstance(event, Wait):
                event = replace(event, call=numbers.get(event.call, event.call))
            again.append(event)
        self._add(again)
        result = self._meter.new(like.shape, like.dtype) if done.counted else torch.empty(like.shape, dtype=like.dtype)
        return result, self._meter.hold(done.stays)

    def _add(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Compute):
                self._tape.compute(event.part, event.seconds)
            else:
                self._tape.events.append(event)


class _Repeated(torch.autograd.Function):
    """Layers from rows to rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, repetition: Repetition, did: _Done, done: _Pass) -> Tensor:
        result, ctx.held = repetition.repeat(did, hidden)
        ctx.repetition, ctx.done = repetition, done
        ctx.save_for_backward(hidden)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        result, _ = ctx.repetition.repeat(replace(ctx.done.backward, stays=Counter()), gradients[0])
        ctx.held.clear()
        return result, None, None, None
