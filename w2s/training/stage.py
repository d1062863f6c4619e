"""A stage, as the training loop sees it, and one step of it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from w2s.checkpoint.starts.handover import Handover
from w2s.data.samples.batch import Batch
from w2s.data.samples.sample import SampleSpec
from w2s.megatron.cpu import without_function_mode
from w2s.megatron.parallel.optimizer import Optimizer, Towers
from w2s.megatron.parallel.process_groups import Ranks
from w2s.tracking.tracker import Tracker


class Stage(Protocol):
    """What a stage gives the training loop."""

    towers: Towers
    """The wrapped towers by name."""
    teachers: Sequence[nn.Module]
    """The frozen models that it learns from; empty without one."""
    optimizer: Optimizer
    """The optimizer of all towers."""
    spec: SampleSpec
    """What the stage needs of a sample."""
    ranks: Ranks
    """The ranks that its losses and statistics go over."""

    def begin(self) -> Handover | None:
        """Take over the weights that `init` names, if it names some."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Accumulate the gradients of a global batch, of which this rank read a share; return what to log."""

    def evaluate(self) -> dict[str, float]:
        """Measure on the test set; the same on every rank."""

    def finish(self, tracker: Tracker) -> dict[str, float]:
        """Measure once more, make pictures and tables; return the metrics of the finished stage."""

    def extra_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold beside weights and optimizer; equal on all ranks."""

    def load_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        """Take back what `extra_state` gave."""


def train_step(stage: Stage, batch: Batch, factor: float) -> dict[str, Tensor]:
    """Update the weights once.

    Args:
        stage: the stage.
        batch: this rank's share of the global batch.
        factor: fraction of the peak learning rates.

    Returns:
        What the stage reports, with the gradient norm before clipping and the highest learning rate.
    """
    with without_function_mode():
        stage.optimizer.zero_grad()
        metrics = stage.step(batch)
        grad_norm = stage.optimizer.step(factor, metrics.get("loss"))
    return {**metrics, "grad_norm": grad_norm, "lr": torch.tensor(stage.optimizer.highest_lr)}
