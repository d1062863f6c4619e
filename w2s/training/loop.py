"""The loop that every training stage shares: a step, then what follows it."""

from contextlib import ExitStack

from w2s.processes.stopping import stop_when_ready
from w2s.tracking.meters import StepMeter
from w2s.training.callbacks import Training
from w2s.training.following import Evaluation, ReplicaCheck, Stopping
from w2s.training.logging import Logging
from w2s.training.saving import Saving
from w2s.training.training_run import RollBack, TrainingRun


def train(run: TrainingRun) -> None:
    """Train up to the last step.

    After each step the callbacks of the user are called first. Then, in this order, a line is logged, replicas are
    compared, the stage is measured (before the checkpoint, as it may decide how the stage continues), a checkpoint is
    saved, and the run stops if it was asked to.

    Raises:
        StopRun: SIGTERM or Ctrl-C came; the state is saved.
        W2SError: steps are skipped again and again.
    """
    stage, saving = run.stage, Saving(run)
    run.callbacks += [Logging(run), ReplicaCheck(run), Evaluation(run), saving, Stopping(run, saving)]
    training = Training(run.config, run.folder, stage.towers, stage.optimizer, run.ranks, run.tracker)
    run.tell_news()
    with ExitStack() as ending:
        for callback in run.callbacks:
            callback.begin(training)
            ending.callback(callback.end)
        run.heartbeat.signals = ending.enter_context(stop_when_ready())
        ending.callback(lambda: run.stream.close())
        run.meter = StepMeter(run.ranks.device)
        while run.step < run.config.train.steps:
            try:
                _step(run, run.step + 1)
            except RollBack as why:
                saving.finish()
                run.roll_back(why)


def _step(run: TrainingRun, step: int) -> None:
    for callback in run.callbacks:
        callback.before_step(step)
    metrics = run.take_step()
    run.meter.update(run.config.train.global_batch, run.stream.wait_seconds)
    for callback in run.callbacks:
        callback.after_step(step, metrics)
