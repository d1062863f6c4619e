"""Without a pipeline: three micro-batches of a pass run, all others repeat what the second one has done.

Micro-batches follow one another, forward and backward. The first one waits for weights that a pass gathers once, and
behind the last one gradients are reduced that a pass reduces once. A fully sharded layer is gathered and reduced in
each; what Megatron gathers ahead at the end of one is waited for in the next.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

from torch import Tensor

from w2s.megatron.parallel import pipeline_schedule
from w2s.rehearsal.repetition import Done, Repetition, passes_through


class RepeatedMicroBatches:
    """Shortens passes without a pipeline."""

    def __init__(self, repetition: Repetition) -> None:
        self._repetition = repetition

    def on(self) -> AbstractContextManager[None]:
        """Inside, passes of Megatron's schedules are shortened."""
        return passes_through(self._pass)

    def _pass(
        self, run: Callable[..., Any], *, num_microbatches: int, forward_step_func: Any, **settings: Any
    ) -> list[pipeline_schedule.Metrics]:
        if num_microbatches <= 3:
            return run(num_microbatches=num_microbatches, forward_step_func=forward_step_func, **settings)
        repeated = _Repeated(self._repetition, forward_step_func, num_microbatches - 3)
        first, second, last = run(num_microbatches=3, forward_step_func=repeated, **settings)
        return [first, second, *repeated.reports, last]


class _Repeated:
    """The step of a pass of three micro-batches, the second of which is repeated; `reports` are its metrics."""

    def __init__(self, repetition: Repetition, step: Callable[..., Any], times: int) -> None:
        self._repetition, self._step, self._times = repetition, step, times
        self._indices = count()
        self._reported: pipeline_schedule.Metrics = {}
        self._end: Callable[[list[Tensor]], Done]
        self.reports: list[pipeline_schedule.Metrics] = []
        self._held: list[list[Tensor]] = []

    def __call__(self, batches: Any, chunk: Any) -> Any:
        """Take a step; Megatron calls this as a micro-batch begins."""
        index = next(self._indices)
        if index == 1:
            self._end = self._repetition.watch()
        if index == 2:
            self._repeat(self._end(list(self._reported.values())))
        output, loss = self._step(batches, chunk)
        return output, self._kept(loss) if index == 1 else loss

    def _kept(self, loss: pipeline_schedule.Loss) -> pipeline_schedule.Loss:
        def kept(output: Any) -> tuple[Tensor, pipeline_schedule.Metrics]:
            value, self._reported = loss(output)
            return value, self._reported

        return kept

    def _repeat(self, done: Done) -> None:
        for _ in range(self._times):
            results, held = self._repetition.repeat(done)
            self._held.append(held)
            self.reports.append(dict(zip(self._reported, results, strict=True)))
        self._repetition.redirect_waits(done)
