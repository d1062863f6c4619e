"""A run in training: what the loop and its callbacks share."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from w2s.checkpoint.own import checkpoint_folders
from w2s.checkpoint.own.in_memory import HostMemory
from w2s.checkpoint.own.verifying import recover
from w2s.config.sections import Config
from w2s.data.samples.batch import Batch
from w2s.data.stream.position import Position
from w2s.data.stream.sources import Source
from w2s.data.stream.stream import Stream
from w2s.errors import W2SError
from w2s.megatron.checkpoint import state
from w2s.megatron.fp8.fp8_stats import Fp8Stats
from w2s.megatron.parallel.process_groups import Ranks
from w2s.optim.lr_schedule import lr_factor
from w2s.processes.liveness.heartbeat import READERS, Heartbeat
from w2s.run import counted, open_stream, origins
from w2s.tracking.meters import StepMeter
from w2s.tracking.tracker import Tracker
from w2s.training.callbacks import Callback
from w2s.training.resuming import load_checkpoint, resume
from w2s.training.stage import Stage, train_step


class RollBack(Exception):
    """Ends what follows a step: the run rolls back to its last checkpoint.

    Args:
        trouble: why, as a part of a sentence.
        again: whether the samples since then are read again, as they are not to blame.
    """

    def __init__(self, trouble: str, *, again: bool = False) -> None:
        super().__init__(trouble)
        self.trouble, self.again = trouble, again


class TrainingRun:
    """A run of a training stage, on one rank of it.

    Args:
        stage: the stage, with weights drawn from the seed.
        config: its configuration.
        folder: the run folder.
        ranks: this process among all.
        heartbeat: where it is noted what is being done.
        memory: keeps checkpoints in the memory of the hosts; None for none.
        sources: of the training samples.
        callbacks: what follows the run.

    Attributes:
        step: optimizer steps done.
        batch: this rank's share of the samples of the last step, on the host.
        meter: measures the steps since the last log line.
        undone: skipped steps that the optimizer no longer counts, as they were rolled back or retaken.
        begun_at: the step that this process began with.
        parent: checkpoint that the run's weights came from at first.
        handover: what became of the weights that `init` names, at the run's first start.
        news: what the user is to be told of how it was resumed.
    """

    batch: Batch
    meter: StepMeter

    def __init__(
        self,
        stage: Stage,
        config: Config,
        folder: Path,
        ranks: Ranks,
        heartbeat: Heartbeat,
        memory: HostMemory | None,
        sources: Sequence[Source],
        callbacks: Sequence[Callback],
    ) -> None:
        self.stage, self.config, self.folder, self.ranks = stage, config, folder, ranks
        self.heartbeat, self.memory, self.sources, self.callbacks = heartbeat, memory, sources, list(callbacks)
        resumed = resume(stage, config, folder, memory)
        self.step, self.parent, self.handover = resumed.step, resumed.parent, resumed.handover
        self.news, self.undone, self.begun_at = list(resumed.news), 0, resumed.step
        self._rollbacks = 0
        self.stream = self._read_from(resumed.position)
        self.fp8_stats = Fp8Stats(stage.towers)
        if memory is not None:
            memory.check_room(sum(tensor.nbytes for tensor in self.own_tensors().values()))
        facts = {**origins(config, self.parent), "parameters": counted(state.tower_shapes(stage.towers))}
        self.tracker = Tracker(config, folder, main=ranks.main, resumed_step=self.step, facts=facts)

    def _read_from(self, position: Position | None) -> Stream:
        """Open this rank's share of the samples at a position."""
        stream = open_stream(
            self.config,
            self.stage.spec,
            rank=self.ranks.data_reader_rank,
            size=self.ranks.world_size,
            position=position,
            sources=self.sources,
        )
        self.heartbeat.helpers[READERS] = stream.reader_pids
        return stream

    def tell_news(self) -> None:
        """Tell the user of `news`, once."""
        while self.news:
            self.tracker.message(self.news.pop(0))

    @property
    def samples(self) -> int:
        """Samples seen so far over all ranks."""
        return self.step * self.config.train.global_batch

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        keep = self.config.checkpoint
        return step % keep.every == 0 or step in keep.keep_at or step == self.config.train.steps

    def is_logged(self, step: int) -> bool:
        """Whether a log line is due after a step."""
        return self.is_saved(step) or step % self.config.train.log_every == 0

    def skipped_in_a_row(self) -> int:
        """Count the steps skipped since the last good one; waits for the device."""
        return int(self.stage.optimizer.guard.consecutive_skips)

    def take_step(self) -> dict[str, Tensor]:
        """Take the next step with the next samples; return what the stage reports."""
        step = self.step + 1
        with self.fp8_stats.recording() if self.is_logged(step) else nullcontext():
            self.heartbeat.at("waiting for samples", step, awaits=READERS)
            self.batch = self.stream.next()
            # Kernels are compiled in the first step.
            self.heartbeat.at("training", step, long=self.step == self.begun_at)
            return self._update(self.batch)

    def retake_step(self, batch: Batch, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the last step, which was skipped, with its batch again; `before` is the stage's state before it."""
        self.step -= 1
        self.stage.load_extra_state(before)
        self.stage.optimizer.clear_skipped()
        metrics = self._update(batch)
        self.undone += not self.skipped_in_a_row()
        return metrics

    def _update(self, batch: Batch) -> dict[str, Tensor]:
        metrics = train_step(self.stage, batch, lr_factor(self.step, self.config.train.steps, self.config.optim))
        self.step += 1
        return metrics

    def roll_back(self, why: RollBack) -> None:
        """Load the last checkpoint; the samples after it are read again or, if they may be to blame, skipped.

        Raises:
            W2SError: there is none, or it has happened too often.
        """
        self.heartbeat.at("rolling back to a checkpoint", self.step, long=True)
        recover(self.folder, self.ranks, strict=self.config.checkpoint.strict)
        newest, trouble = checkpoint_folders.latest(self.folder), f"step {self.step}: {why.trouble}"
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
            self.stream = self._read_from(resumed.position)
        fate, steps = "are read again" if why.again else "are skipped", f"{self.step + 1} to {reached}"
        outcome = f"rolled back to step {self.step}, the samples of steps {steps} {fate}"
        self.tracker.message(f"warning: {trouble}; {outcome}")
        self.tell_news()

    def measure(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Log and return what `measure` finds while the towers hold the weights that `eval.weights` names."""
        with self.stage.optimizer.averaged() if self.config.eval.weights == "ema" else nullcontext():
            metrics = measure()
        if metrics:
            self.tracker.log(self.step, self.samples, metrics)
        return metrics

    def own_tensors(self) -> dict[str, Tensor]:
        """Return what this rank has of a checkpoint."""
        return state.own_tensors(self.stage.towers, self.stage.optimizer, self.stage.extra_state())
