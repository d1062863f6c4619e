"""What the training loop and its callbacks share."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor

from w2s.callbacks import Callback
from w2s.checkpoint.in_memory import HostMemory
from w2s.config.sections import Config
from w2s.data.batch import Batch
from w2s.data.sources import Source
from w2s.data.stream import Position, Stream
from w2s.liveness.heartbeat import READERS, Heartbeat
from w2s.megatron.checkpoint import state
from w2s.megatron.fp8.fp8_stats import Fp8Stats
from w2s.megatron.parallel.process_groups import Ranks
from w2s.optim.lr_schedule import lr_factor
from w2s.run import counted, open_stream, origins, share_sources
from w2s.tracking.meters import StepMeter
from w2s.tracking.tracker import Tracker
from w2s.training.resuming import resume
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


class Progress:
    """A run of a training stage, on one rank of it.

    Args:
        stage: the stage, with weights drawn from the seed.
        config: its configuration.
        run: the run folder.
        ranks: this process among all.
        heartbeat: where it is noted what is being done.
        memory: keeps checkpoints in the memory of the hosts; None for none.
        sources: of the training samples; None finds them.
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
        run: Path,
        ranks: Ranks,
        heartbeat: Heartbeat | None = None,
        memory: HostMemory | None = None,
        sources: Sequence[Source] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.stage, self.config, self.run, self.ranks = stage, config, run, ranks
        self.heartbeat, self.memory, self.callbacks = heartbeat or Heartbeat(), memory, list(callbacks)
        self.sources = share_sources(config, ranks) if sources is None else sources
        resumed = resume(stage, config, run, memory)
        self.step, self.parent, self.handover = resumed.step, resumed.parent, resumed.handover
        self.news, self.undone, self.begun_at = list(resumed.news), 0, resumed.step
        self.stream = self.read_from(resumed.position)
        self.watch = Fp8Stats(stage.towers)
        if memory is not None:
            memory.check_room(sum(tensor.nbytes for tensor in self.own_tensors().values()))
        facts = {**origins(config, self.parent), "parameters": counted(state.tower_shapes(stage.towers))}
        self.tracker = Tracker(config, run, main=ranks.main, resumed_step=self.step, facts=facts)

    def read_from(self, position: Position | None) -> Stream:
        """Open this rank's share of the samples at a position."""
        ranks, spec = self.ranks, self.stage.spec
        size = ranks.world_size
        stream = open_stream(
            self.config, spec, rank=ranks.data_reader_rank, size=size, position=position, sources=self.sources
        )
        self.heartbeat.helpers[READERS] = stream.reader_pids
        return stream

    def tell_news(self) -> None:
        """Tell the user what changed when the checkpoint was loaded."""
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

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take the next step with a batch; return what the stage reports."""
        metrics = train_step(self.stage, batch, lr_factor(self.step, self.config.train.steps, self.config.optim))
        self.step += 1
        return metrics

    def own_tensors(self) -> dict[str, Tensor]:
        """Return what this rank has of a checkpoint."""
        return state.own_tensors(self.stage.towers, self.stage.optimizer, self.stage.extra_state())

    def weights_to_measure(self) -> AbstractContextManager[None]:
        """Inside, the towers hold the weights that `eval.weights` names."""
        return self.stage.optimizer.averaged() if self.config.eval.weights == "ema" else nullcontext()
