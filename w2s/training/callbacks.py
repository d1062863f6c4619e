"""What people add to the training loop without touching it: `train.callbacks=[module:Class]`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from w2s.config.imported import imported_class
from w2s.config.sections import Config
from w2s.megatron.parallel.optimizer import Optimizer, Towers
from w2s.megatron.parallel.process_groups import Ranks
from w2s.tracking.tracker import Tracker


@dataclass(frozen=True)
class Training:
    """The run that callbacks follow, on one rank of it."""

    config: Config
    """The resolved configuration."""
    folder: Path
    """The run folder."""
    towers: Towers
    """The wrapped towers by name: this rank's share of their layers."""
    optimizer: Optimizer
    """The optimizer of all towers."""
    ranks: Ranks
    """This process among all."""
    tracker: Tracker
    """Where messages, metrics, tables and files go; only the main rank's writes."""


class Callback:
    """Follows a run; each method is called on every rank, and does nothing until it is overridden.

    Steps are counted from 1. One that is taken again after a rollback to a checkpoint is reported again. What a
    method raises ends the run.
    """

    def begin(self, training: Training) -> None:
        """Weights, optimizer and data stand where the run begins or resumes; no step has been taken."""

    def before_step(self, step: int) -> None:
        """The samples of a step are read next."""

    def after_step(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """The weights are updated; `metrics` are this rank's scalars, on the device: to read one waits for it."""

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        """A log line is due; `metrics` are means over all ranks, on every rank."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """The run has been measured on its test sets, as `train.eval_every` says.

        What the stage measures of the finished run, after `end`, is not reported.
        """

    def saved(self, step: int, checkpoint: Path) -> None:
        """The checkpoint of a step is complete; later steps may have been taken since."""

    def end(self) -> None:
        """The last step has been taken, or the run ends early: on a signal or an error."""


def load_callbacks(names: Sequence[str]) -> list[Callback]:
    """Make the callbacks of `train.callbacks`, each written `module:Class`.

    Raises:
        ConfigError: a name is not that of a class of callbacks that can be imported and made without arguments.
    """
    return [imported_class("train.callbacks", name, Callback)() for name in names]
