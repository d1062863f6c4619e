"""Callbacks of every run: what is compared, measured and asked for after a step."""

import signal
from collections.abc import Mapping

from torch import Tensor

from w2s.errors import StopRun
from w2s.megatron.parallel.replicas import repair
from w2s.training.callbacks import Callback, Training
from w2s.training.saving import Saving
from w2s.training.training_run import RollBack, TrainingRun


class ReplicaCheck(Callback):
    """Compares the replicas' weights every `train.check_replicas` steps, and repairs what can be repaired."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def after_step(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Compare if it is time."""
        every = self._run.config.train.check_replicas
        if every and step % every == 0 and not self._agree():
            raise RollBack("the replicas hold different weights, and no majority of them agrees", again=True)

    def _agree(self) -> bool:
        run = self._run
        run.stage.optimizer.gather_weights()
        odd = [each for of_rank in run.ranks.gather(repair(run.stage.towers, run.ranks.data_group)) for each in of_rank]
        for each in dict.fromkeys(odd):
            how = "taken from the others" if each.repaired else "with no majority"
            run.tracker.message(f"warning: step {run.step}: {each.weight} differs on ranks {list(each.ranks)}, {how}")
        return all(each.repaired for each in odd)


class Evaluation(Callback):
    """Measures a new run before its first step, and every `train.eval_every` steps."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def begin(self, training: Training) -> None:
        """Measure what the run starts from."""
        if self._run.step == 0:
            self._measure()

    def after_step(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Measure if it is time; at the end the stage does so itself."""
        train = self._run.config.train
        if train.eval_every and step % train.eval_every == 0 and step < train.steps:
            with self._run.meter.paused():
                self._measure()

    def _measure(self) -> None:
        run = self._run
        run.heartbeat.at("evaluating", run.step, long=True)
        run.stage.optimizer.gather_weights()
        metrics = run.measure(run.stage.evaluate)
        if metrics:
            for callback in run.callbacks:
                callback.evaluated(run.step, metrics)


class Stopping(Callback):
    """Saves and ends the run after a signal."""

    def __init__(self, run: TrainingRun, saving: Saving) -> None:
        self._run, self._saving = run, saving

    def after_step(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Stop if one of the ranks was asked to.

        Raises:
            StopRun: one was; the state is saved.
        """
        run, signals = self._run, self._run.heartbeat.signals
        # A rank that stopped alone would leave the others waiting.
        if not run.ranks.any(bool(signals)):
            return
        skipped = run.skipped_in_a_row()
        if not run.is_saved(step) and not skipped:
            self._saving.save()
        self._saving.finish()
        refused = self._saving.refused
        if run.memory is not None and not skipped and not refused:
            run.memory.forget()
        asked = signals[0] if signals else signal.SIGTERM
        name, kept = signal.Signals(asked).name, f"saved in {run.folder}"
        if skipped or refused:
            kept = f"not saved: {refused[-1] if refused else 'it was skipped'}"
        raise StopRun(f"stopped by {name} at step {step}, {kept}: repeat the command to resume", asked)
