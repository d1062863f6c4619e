"""The loop that every training stage shares: a step, then what follows it."""

from contextlib import ExitStack, nullcontext

from torch import Tensor

from w2s.callbacks import Training
from w2s.checkpoint import checkpoint_folders
from w2s.checkpoint.verifying import recover
from w2s.errors import W2SError
from w2s.liveness.heartbeat import READERS
from w2s.stopping import stop_when_ready
from w2s.tracking.meters import StepMeter
from w2s.training.following import Evaluation, ReplicaCheck, Stopping
from w2s.training.logging import Logging
from w2s.training.progress import Progress, RollBack
from w2s.training.resuming import load_checkpoint
from w2s.training.saving import Saving


class Trainer(Progress):
    """Trains a stage in a run folder.

    After each step the callbacks of the user are called first. Then, in this order, a line is logged, replicas are
    compared, the stage is measured (before the checkpoint, as it may decide how the stage continues), a checkpoint is
    saved, and the run stops if it was asked to.
    """

    _rollbacks = 0

    def train(self) -> None:
        """Train up to the last step.

        Raises:
            StopRun: SIGTERM or Ctrl-C came; the state is saved.
            W2SError: steps are skipped again and again.
        """
        stage, saving = self.stage, Saving(self)
        self.callbacks += [Logging(self), ReplicaCheck(self), Evaluation(self), saving, Stopping(self, saving)]
        training = Training(self.config, self.run, stage.towers, stage.optimizer, self.ranks, self.tracker)
        with ExitStack() as ending:
            for callback in self.callbacks:
                callback.begin(training)
                ending.callback(callback.end)
            self.heartbeat.signals = ending.enter_context(stop_when_ready())
            ending.callback(lambda: self.stream.close())
            self.meter = StepMeter(self.ranks.device)
            while self.step < self.config.train.steps:
                try:
                    self._take_step(self.step + 1)
                except RollBack as why:
                    saving.finish()
                    self._roll_back(why)

    def _take_step(self, step: int) -> None:
        for callback in self.callbacks:
            callback.before_step(step)
        with self.watch.recording() if self.is_logged(step) else nullcontext():
            metrics = self._step()
        self.meter.update(self.config.train.global_batch, self.stream.wait_seconds)
        for callback in self.callbacks:
            callback.after_step(step, metrics)

    def _step(self) -> dict[str, Tensor]:
        self.heartbeat.at("waiting for samples", self.step + 1, awaits=READERS)
        self.batch = self.stream.next()
        # Kernels are compiled in the first step.
        self.heartbeat.at("training", self.step + 1, long=self.step == self.begun_at)
        return self.update(self.batch)

    def _roll_back(self, why: RollBack) -> None:
        """Load the last checkpoint; the samples after it are read again or, if they may be to blame, skipped."""
        self.heartbeat.at("rolling back to a checkpoint", self.step, long=True)
        recover(self.run, self.ranks, strict=self.config.checkpoint.strict)
        newest, trouble = checkpoint_folders.latest(self.run), f"step {self.step}: {why.trouble}"
        if newest is None or self._rollbacks == self.config.train.rollbacks:
            reason = "there is no checkpoint" if newest is None else f"the run has rolled back {self._rollbacks} times"
            raise W2SError(f"{trouble}, and {reason}: lower optim.lr, lengthen optim.warmup or look at the data")
        self._rollbacks += 1
        reached, skipped = self.step, int(self.stage.optimizer.guard.skipped)
        self.stage.optimizer.gather_weights()  # an all-gather that is still due would overwrite what is loaded
        resumed = load_checkpoint(newest, self.stage, self.config)
        self.step, self.news = resumed.step, list(resumed.news)
        self.undone += skipped - int(self.stage.optimizer.guard.skipped)
        self.tracker.rewind(self.step)
        if why.again:
            self.stream.close()
            self.stream = self.read_from(resumed.position)
        fate, steps = "are read again" if why.again else "are skipped", f"{self.step + 1} to {reached}"
        outcome = f"rolled back to step {self.step}, the samples of steps {steps} {fate}"
        self.tracker.message(f"warning: {trouble}; {outcome}")
        self.tell_news()

    def finish(self) -> dict[str, float]:
        """Measure once more, make pictures and tables; return the metrics of the finished stage."""
        with self.weights_to_measure():
            metrics = self.stage.finish(self.tracker)
        if metrics:
            self.tracker.log(self.step, self.samples, metrics)
        return metrics
