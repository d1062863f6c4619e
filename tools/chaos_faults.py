"""Faults in one rank of a run, for tools/chaos.py.

Kinds: `nan` (the rank's gradients are not numbers), `spike` (300 times too large), `loud` (100 times), `flip` (one bit
of a weight, after the update) and `writer` (the process that writes the checkpoint of that step is killed at its end).
"""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w2s.checkpoint.own.checkpoint_folders import step_name
from w2s.data.samples.batch import Batch
from w2s.megatron.checkpoint import async_save
from w2s.megatron.parallel.optimizer import Towers
from w2s.training import training_run
from w2s.training.stage import Stage

FACTORS = {"nan": float("nan"), "spike": 300.0, "loud": 100.0}
BIT = 2**27
"""A high bit of the exponent: the weight becomes larger or smaller by a factor of 2**16."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, after how many steps of the process, on which rank."""

    kind: str
    step: int
    rank: int

    def here(self) -> bool:
        """Whether this process is that rank."""
        return os.environ.get("RANK") == str(self.rank)

    def inject(self) -> None:
        """Let it happen in this process, or in those that it forks."""
        if self.kind == "writer":
            _kill_writer(self)
        else:
            training_run.train_step = _Faulty(self)


def _kill_writer(fault: Fault) -> None:
    genuine = async_save._WriterResults.put

    def put(results: async_save._WriterResults, result: Any) -> None:
        if step_name(fault.step) in results._folder.name and fault.here():
            os.kill(os.getpid(), signal.SIGKILL)
        genuine(results, result)

    async_save._WriterResults.put = put  # type: ignore[method-assign]


class _Faulty:
    """A training step that does what it should but once."""

    def __init__(self, fault: Fault) -> None:
        self._fault, self._genuine, self._done = fault, training_run.train_step, 0

    def __call__(self, stage: Stage, batch: Batch, factor: float) -> dict[str, Tensor]:
        self._done += 1
        if self._done != self._fault.step or not self._fault.here():
            return self._genuine(stage, batch, factor)
        if self._fault.kind == "flip":
            metrics = self._genuine(stage, batch, factor)
            stage.optimizer.gather_weights()
            next(_weights(stage.towers)).data.view(torch.int32).view(-1)[0] ^= BIT
            return metrics
        step = stage.step
        stage.step = self._scaling(step, stage)  # type: ignore[method-assign]
        try:
            return self._genuine(stage, batch, factor)
        finally:
            stage.step = step  # type: ignore[method-assign]

    def _scaling(self, step: Callable[[Batch], dict[str, Tensor]], stage: Stage) -> Callable[[Batch], Any]:
        def scaling(batch: Batch) -> dict[str, Tensor]:
            metrics = step(batch)
            for weight in _weights(stage.towers):
                weight.main_grad.mul_(FACTORS[self._fault.kind])  # type: ignore[attr-defined]
            return metrics

        return scaling


def _weights(towers: Towers) -> Iterator[Tensor]:
    for tower in towers.values():
        for part in tower.chunks:
            yield from part.parameters()
