"""With a pipeline: the layers of three micro-batches of a pass run, those of all others repeat what they have done.

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
from w2s.rehearsal.repetition import Done, Repetition, passes_through


@dataclass
class _Pass:
    """What the layers of a chunk have done in a pass so far."""

    seen: int = 0
    """Micro-batches."""
    forward: Done | None = None
    backward: Done | None = None


class RepeatedLayers:
    """Shortens passes through a pipeline."""

    def __init__(self, repetition: Repetition) -> None:
        self._repetition = repetition
        self._micro_batches = 0
        self._passes: dict[Any, _Pass] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, passes of Megatron's schedules are shortened."""
        whole = TransformerBlock.forward

        def forward(layers: Any, hidden: Any, *args: Any, **kwargs: Any) -> Tensor:
            return self._forward(partial(whole, layers), layers, hidden, args, kwargs)

        with passes_through(self._pass), mock.patch.object(TransformerBlock, "forward", forward):
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
        index, done.seen = done.seen, done.seen + 1
        if index == 1 and self._micro_batches > 3:
            return self._watched(partial(whole, hidden, *args, **kwargs), entry, done)
        if done.forward is None or index == self._micro_batches - 1:
            return whole(hidden, *args, **kwargs)
        return _Repeated.apply(entry, self._repetition, done.forward, done)

    def _watched(self, whole: Callable[[], Tensor], entry: Tensor, done: _Pass) -> Tensor:
        """Run layers, and note what they do in both directions."""
        end = self._repetition.watch()
        result = whole()
        did = end([result])
        if result.requires_grad and not entry.requires_grad:
            return result  # no gradient says where the backward pass ends
        done.forward = did
        if not result.requires_grad:
            return result
        ends: list[Callable[[list[Tensor]], Done]] = []

        def begin(gradient: Tensor) -> None:
            ends.append(self._repetition.watch())

        def finish(gradient: Tensor) -> None:
            done.backward = ends.pop()([gradient])

        result.register_hook(begin)
        entry.register_hook(finish)
        return result


class _Repeated(torch.autograd.Function):
    """Layers from packed tokens to packed tokens."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, repetition: Repetition, did: Done, done: _Pass) -> Tensor:
        (result,), ctx.held = repetition.repeat(did)
        ctx.repetition, ctx.done = repetition, done
        ctx.save_for_backward(hidden)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (result,), _ = ctx.repetition.repeat(replace(ctx.done.backward, stays=Counter()))
        ctx.held.clear()
        return result, None, None, None
