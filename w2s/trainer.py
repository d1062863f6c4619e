"""The loop that every training stage shares: restore, step, log, evaluate, save, stop."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from w2s.callbacks import Callback, Training, load_callbacks
from w2s.checkpoint import store
from w2s.checkpoint.continued import find_continued, with_its_start
from w2s.checkpoint.handover import Handover, check_shapes
from w2s.checkpoint.memory import HostMemory, host_memory
from w2s.checkpoint.verifying import recover, verify
from w2s.config.checks import doubts
from w2s.config.naming import difference, written
from w2s.config.sections import Config
from w2s.data.batch import Batch
from w2s.data.sample import SampleSpec
from w2s.data.sizes import Counting, count_samples
from w2s.data.sources import Source
from w2s.data.stream import Position, Stream, merge_positions
from w2s.errors import CheckpointError, StopRun, UserError, W2SError
from w2s.host import compute_deterministically
from w2s.liveness.pulse import READERS, WRITER, Pulse
from w2s.megatron import groups, state
from w2s.megatron.cpu import unasked
from w2s.megatron.groups import Ranks
from w2s.megatron.optimizer import Optimizer, Towers
from w2s.megatron.replicas import mend
from w2s.megatron.sharded import whole
from w2s.megatron.watch import Float8Watch, float8_metrics
from w2s.megatron.writing import Writing
from w2s.optim.schedule import lr_factor
from w2s.profiling import Profiler
from w2s.registering import register_clip
from w2s.rerun import clones, explain
from w2s.run import (
    counted,
    open_run,
    origins,
    share_sources,
    test_inputs,
    tracked,
    training_inputs,
    write_result,
)
from w2s.stopping import stop_when_ready
from w2s.tracking.meters import StepMeter, over_ranks
from w2s.tracking.tracker import Tracker

PACKAGES = ("w2s", "torch", "megatron-core")


class Stage(Protocol):
    """What a stage gives the trainer."""

    towers: Towers
    """The wrapped towers by name."""
    teachers: Sequence[nn.Module]
    """The frozen models that it learns from; empty without one."""
    optimizer: Optimizer
    """The optimizer of all towers."""
    spec: SampleSpec
    """What the stage wants of a sample."""
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


class Trainer:
    """Trains a stage in a run folder."""

    def __init__(
        self,
        stage: Stage,
        config: Config,
        run: Path,
        ranks: Ranks,
        pulse: Pulse | None = None,
        memory: HostMemory | None = None,
        sources: Sequence[Source] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.callbacks = callbacks
        self.sources = share_sources(config, ranks) if sources is None else sources
        self._counting: Counting | None = None
        self.stage, self.config, self.run, self.ranks = stage, config, run, ranks
        self.pulse, self.memory = pulse or Pulse(), memory
        self._news: list[str] = []
        self.step, self.parent, self.handover, position = self._restore()
        self.stream = self._read_from(position)
        self.watch = Float8Watch(stage.towers)
        self._saving: store.Saving | None = None
        self._refused: list[CheckpointError] = []
        self._rollbacks = self._undone = 0
        self._begun_at = self.step
        if memory is not None:
            memory.check_room(sum(tensor.nbytes for tensor in self._own_tensors().values()))
        facts = {**origins(config, self.parent), "parameters": counted(state.tower_shapes(stage.towers))}
        self.tracker = Tracker(config, run, main=ranks.main, resumed_step=self.step, facts=facts)

    def _read_from(self, position: Position | None) -> Stream:
        ranks, spec = self.ranks, self.stage.spec
        size = ranks.world_size
        stream = open_stream(self.config, spec, rank=ranks.reader, size=size, position=position, sources=self.sources)
        self.pulse.helpers[READERS] = stream.reader_pids
        return stream

    def tell_news(self) -> None:
        """Say what became of the run when its checkpoint was taken up."""
        while self._news:
            self.tracker.message(self._news.pop(0))

    @property
    def samples(self) -> int:
        """Samples seen so far over all ranks."""
        return self.step * self.config.train.global_batch

    @property
    def _skipped_in_a_row(self) -> int:
        """Steps skipped since the last good one; waits for the device."""
        return int(self.stage.optimizer.guard.in_a_row)

    def _restore(self) -> tuple[int, str | None, Handover | None, dict[str, Any] | None]:
        """Take up the run where it stands; return step, parent checkpoint, hand-over and position in the data.

        1. This run's checkpoint in the memory of the hosts, if one was found: weights, optimizer, data position.
        2. Else its own latest checkpoint, if it has one, as `recover` has left it.
        3. Else all that of the checkpoint that `init.checkpoint` names.
        4. Else the weights that `init` names; a new optimizer.
        5. Else the weights drawn from the seed.
        """
        if self.memory is not None and self.memory.meta is not None:
            meta, optimizer = self.memory.meta, self.stage.optimizer
            self._refuse_another_run(meta)
            extra = state.take_up(self.memory.read(), self.stage.towers, optimizer, meta.step)
            self.stage.load_extra_state(extra)
            self._note_average(meta)
            return meta.step, meta.parent, None, dict(meta.data)
        own = store.latest(self.run)
        if own is not None:
            self._refuse_another_run(store.read_meta(own))
            meta = self._take_up(own)
            return meta.step, meta.parent, None, dict(meta.data)
        other = find_continued(self.config)
        if other is not None:
            verify(other)
            check_shapes(self.stage.towers, other)
            meta = self._take_up(other)
            return meta.step, str(other), None, dict(meta.data)
        with whole(self.stage.towers.values()):
            handover = self.stage.begin()
        if handover is None:
            return 0, None, None, None
        self.stage.optimizer.reload_weights()
        return 0, handover.parent, handover, None

    def _take_up(self, checkpoint: Path) -> store.Meta:
        meta = store.read_meta(checkpoint)
        self.stage.load_extra_state(state.load(checkpoint, self.stage.towers, self.stage.optimizer, meta.step))
        self._note_average(meta)
        return meta

    def _note_average(self, meta: store.Meta) -> None:
        """Note where the moving average of the weights begins anew, or ends."""
        kept, saved = bool(self.config.optim.ema), bool(meta.config.get("optim", {}).get("ema"))
        if kept and not saved:
            self._news.append(f"the moving average begins at the weights of step {meta.step}: there was none before")
        elif saved and not kept:
            self._news.append(f"the moving average ends at step {meta.step}: optim.ema=0 keeps none")

    def _refuse_another_run(self, meta: store.Meta) -> None:
        found = difference(self.config, meta.config)
        if found is not None:
            key, then, now = found
            raise UserError(
                f"{self.run} was begun with {key}={then}, not {key}={now}: keep that, or choose another run.name"
            )

    def train(self) -> None:
        """Train up to the last step.

        Raises:
            StopRun: SIGTERM or Ctrl-C came; the state is saved.
            W2SError: steps are skipped again and again.
        """
        stage = self.stage
        training = Training(self.config, self.run, stage.towers, stage.optimizer, self.ranks, self.tracker)
        for callback in self.callbacks:
            callback.begin(training)
        try:
            self._train()
        finally:
            for callback in self.callbacks:
                callback.end()

    def _train(self) -> None:
        train, keep = self.config.train, self.config.checkpoint
        unlogged: list[Batch] = []
        # Fully sharded, no rank has gradients of its own to compare: nothing is repeated.
        repeats = self.config.parallel.shard != "full"
        meter = StepMeter(self.ranks.device)
        if self.handover is not None:
            self.tracker.table("handover", ["", "tensors", "names"], self.handover.rows(), self.handover.title)
        if self.ranks.main:
            self._show_sources()
        if self.step == 0:
            self._evaluate()
        with stop_when_ready() as signals, self._no_helper_left():
            self.pulse.signals = signals
            while self.step < train.steps:
                step = self.step + 1
                saved = step % keep.every == 0 or step in keep.keep_at or step == train.steps
                logs = saved or step % train.log_every == 0
                before = clones(self.stage.extra_state()) if logs else {}
                for callback in self.callbacks:
                    callback.before_step(step)
                with self.watch.looking() if logs else nullcontext():
                    batch, metrics = self._step()
                for callback in self.callbacks:
                    callback.after_step(step, metrics)
                meter.update(train.global_batch, self.stream.wait_seconds)
                if repeats:
                    unlogged.append(batch)
                if logs:
                    metrics = self._repeat(unlogged, before) or metrics
                    unlogged.clear()
                    self._log(metrics, meter.read())
                    # A run ends with a good step only.
                    skipped, most = self._skipped_in_a_row, train.bad_steps if self.step < train.steps else 1
                    if skipped >= most:
                        self._go_back(f"loss or gradient norm of the last {skipped} steps was not a number, or a spike")
                        continue
                if train.check_replicas and self.step % train.check_replicas == 0 and not self._replicas_agree():
                    # The data are not to blame: the same samples come again.
                    self._go_back("the replicas hold different weights, and no majority of them agrees", again=True)
                    continue
                with meter.paused():
                    # An evaluation may decide how the stage goes on, which its checkpoint has to know.
                    if train.eval_every and self.step % train.eval_every == 0 and self.step < train.steps:
                        self._evaluate()
                    if saved and not self._skipped_in_a_row:  # else the weights may be what is wrong
                        self._save()
                    self._finish_saving_if_written()
                self._stop_if_asked(signals, saved)
            self._finish_saving()

    def _show_sources(self) -> None:
        """Show what is read, and begin to count what nobody has counted."""
        index = Path(self.config.data.index)
        sizes = {source.name: count_samples(source.shards, index) for source in self.sources}
        rows = self.stream.source_rows(sizes)
        self.tracker.table("sources", ["source", "shards", "samples", "weight"], rows, "training data")
        unknown = {source.name: source.shards for source in self.sources if sizes[source.name] is None}
        self._counting = Counting(unknown, index) if unknown else None

    def _step(self) -> tuple[Batch, dict[str, Tensor]]:
        self.pulse.at("waiting for samples", self.step + 1, awaits=READERS)
        batch = self.stream.next()
        # Kernels are compiled in the first step.
        self.pulse.at("training", self.step + 1, long=self.step == self._begun_at)
        metrics = train_step(self.stage, batch, self._lr_factor)
        self.step += 1
        return batch, metrics

    @property
    def _lr_factor(self) -> float:
        return lr_factor(self.step, self.config.train.steps, self.config.optim)

    def _repeat(self, batches: Sequence[Batch], before: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Say whose fault it is that one of the last steps was skipped, if one was.

        Where it was the last step and the fault has passed, the step is taken after all.

        Args:
            batches: of the steps since the last that was logged.
            before: the stage's state before the last of them.
        """
        since = int(self.stage.optimizer.guard.since)
        if since >= len(batches):
            return None
        self.pulse.at("repeating a bad step", self.step, long=True)
        verdict = explain(self.stage, batches[-1 - since], self.ranks)
        again = verdict.passing and not since
        when = f" at step {self.step}" if since else ""
        words = f"{verdict.words}{'; the step is taken again' if again else ''}"
        self.tracker.message(f"warning: step {self.step - since} was skipped; repeated{when}, it is {words}")
        return self._take_again(batches[-1], before) if again else None

    def _take_again(self, batch: Batch, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.step -= 1
        self.stage.load_extra_state(before)
        self.stage.optimizer.forget_skipped()
        metrics = train_step(self.stage, batch, self._lr_factor)
        self.step += 1
        self._undone += not self._skipped_in_a_row
        return metrics

    def _log(self, metrics: Mapping[str, Tensor], figures: Mapping[str, float]) -> None:
        """Average over the ranks: the only place in the loop that waits for the device."""
        own = self.ranks.numbers(metrics), self.watch.read(), figures, self.stream.counts()
        numbers, counts, everyones, read = zip(*self.ranks.gather(own), strict=True)
        averages = groups.means(numbers) | float8_metrics(counts)
        skipped = int(self.stage.optimizer.guard.skipped) + self._undone
        if skipped:
            averages["skipped_steps"] = skipped
        compared = over_ranks(everyones, ("seconds_per_step", "data_wait"))
        data = self.stream.metrics(groups.sums(read))
        logged = {**averages, **figures, **compared, **data}
        self.tracker.log(self.step, self.samples, logged)
        for callback in self.callbacks:
            callback.logged(self.step, logged)
        for line in self._counting.news() if self._counting else ():
            self.tracker.message(f"counted: {line}")

    def _replicas_agree(self) -> bool:
        """Compare the replicas' weights, mend what can be mended, and return whether they are alike now."""
        self.stage.optimizer.gather_weights()
        odd = [each for some in self.ranks.gather(mend(self.stage.towers, self.ranks.data_group)) for each in some]
        for each in dict.fromkeys(odd):
            how = "taken from the others" if each.mended else "with no majority"
            self.tracker.message(f"warning: step {self.step}: {each.weight} differs on ranks {list(each.ranks)}, {how}")
        return all(each.mended for each in odd)

    def _go_back(self, trouble: str, *, again: bool = False) -> None:
        """Take up the last checkpoint, and the samples after it `again` or, where they may have led here, no more."""
        self._finish_saving()
        self.pulse.at("going back to a checkpoint", self.step, long=True)
        recover(self.run, self.ranks, strict=self.config.checkpoint.strict)
        newest, trouble = store.latest(self.run), f"step {self.step}: {trouble}"
        if newest is None or self._rollbacks == self.config.train.rollbacks:
            why = "there is no checkpoint" if newest is None else f"the run has gone back {self._rollbacks} times"
            raise W2SError(f"{trouble}, and {why}: lower optim.lr, lengthen optim.warmup or look at the data")
        self._rollbacks += 1
        reached, skipped = self.step, int(self.stage.optimizer.guard.skipped)
        self.stage.optimizer.gather_weights()  # a gathering that is still due would write over what is loaded
        meta = self._take_up(newest)
        self.step = meta.step
        self._undone += skipped - int(self.stage.optimizer.guard.skipped)
        self.tracker.rewind(self.step)
        if again:
            self.stream.close()
            self.stream = self._read_from(dict(meta.data))
        samples = f"the samples of steps {self.step + 1} to {reached} {'come again' if again else 'are passed over'}"
        self.tracker.message(f"warning: {trouble}; back at step {self.step}, {samples}")
        self.tell_news()

    def _evaluate(self) -> None:
        self.pulse.at("evaluating", self.step, long=True)
        self.stage.optimizer.gather_weights()
        with self._weights_to_measure():
            metrics = self.stage.evaluate()
        if metrics:
            self.tracker.log(self.step, self.samples, metrics)
            for callback in self.callbacks:
                callback.evaluated(self.step, metrics)

    def _weights_to_measure(self) -> AbstractContextManager[None]:
        """Inside, the towers hold the weights that `eval.weights` names."""
        return self.stage.optimizer.averaged() if self.config.eval.weights == "ema" else nullcontext()

    def finish(self) -> dict[str, float]:
        """Measure once more, make pictures and tables; return the metrics of the finished stage."""
        with self._weights_to_measure():
            metrics = self.stage.finish(self.tracker)
        if metrics:
            self.tracker.log(self.step, self.samples, metrics)
        return metrics

    def _save(self) -> None:
        self.stage.optimizer.gather_weights()
        data = merge_positions(self.ranks.gather(self.stream.position()))
        meta = store.Meta(
            stage=self.config.stage,
            step=self.step,
            samples=self.samples,
            config=written(self.config),
            data=data,
            parent=self.parent,
            mlflow_run_id=self.tracker.run_id,
            versions={package: version(package) for package in PACKAGES},
        )

        self._keep_in_memory(meta)

        def write(folder: Path) -> Writing:
            extra, background = self.stage.extra_state(), self.config.checkpoint.async_save
            writing = state.save(folder, self.stage.towers, self.stage.optimizer, extra, background)
            self.pulse.helpers[WRITER] = writing.writer_pids
            return writing

        self._finish_saving()
        self.pulse.at("saving a checkpoint", self.step, long=True)
        with self._training_on_if_refused(self.step):
            self._saving = store.Saving(self.run, meta, write, self.config.checkpoint, self.ranks)
        if not self.config.checkpoint.async_save:
            self._finish_saving()

    def _keep_in_memory(self, meta: store.Meta) -> None:
        if self.memory is None:
            return
        self.pulse.at("keeping a checkpoint in memory", self.step, long=True)
        began = time.perf_counter()
        try:
            size = self.memory.keep(meta, self._own_tensors())
        except CheckpointError as error:
            self.tracker.message(f"warning: {error}; training goes on")
            return
        seconds = time.perf_counter() - began
        if meta.step <= self._begun_at + self.config.checkpoint.every:  # once is enough
            self.tracker.message(f"step {meta.step} is in memory: {size / 2**30:.3g} GiB a rank in {seconds:.2g} s")

    def _own_tensors(self) -> dict[str, Tensor]:
        return state.own_tensors(self.stage.towers, self.stage.optimizer, self.stage.extra_state())

    def _finish_saving(self) -> None:
        if self._saving is not None:
            self.pulse.at("finishing a checkpoint", self.step, awaits=WRITER, long=True)
            saving, self._saving = self._saving, None
            with self._training_on_if_refused(saving.step):
                checkpoint = saving.finish()
                self.tracker.note(checkpoint=str(checkpoint.absolute()))
                self._refused = []
                for callback in self.callbacks:
                    callback.saved(saving.step, checkpoint)
            self.pulse.helpers.pop(WRITER, None)

    @contextmanager
    def _no_helper_left(self) -> Iterator[None]:
        """End the reading processes and, where the run fails, a writing one: they would hold up this one's end."""
        try:
            yield
        finally:
            self.stream.close()
            if self._saving is not None:
                self._saving.abandon()

    @contextmanager
    def _training_on_if_refused(self, step: int) -> Iterator[None]:
        """Let the run go on without a step's checkpoint that the system refuses, as long as an older one stands."""
        try:
            yield
        except CheckpointError as error:
            self._refused.append(error)
            standing, most = store.latest(self.run), self.config.checkpoint.failures
            if standing is None or len(self._refused) == most or step == self.config.train.steps:
                raise
            count = f"{len(self._refused)} of at most {most} in a row"
            self.tracker.message(f"warning: {error}; training goes on, {standing.name} stands ({count})")

    def _finish_saving_if_written(self) -> None:
        # As the others wait in `finish`, no rank may go there alone.
        if self._saving is not None and not self.ranks.any(not self._saving.written):
            self._finish_saving()

    def _stop_if_asked(self, signals: list[int], saved: bool) -> None:
        # A rank that stopped alone would leave the others waiting.
        if not self.ranks.any(bool(signals)):
            return
        skipped = self._skipped_in_a_row
        if not saved and not skipped:
            self._save()
        self._finish_saving()
        if self.memory is not None and not skipped and not self._refused:
            self.memory.forget()
        number = signals[0] if signals else signal.SIGTERM
        name, kept = signal.Signals(number).name, f"saved in {self.run}"
        if skipped or self._refused:
            kept = f"not saved: {self._refused[-1] if self._refused else 'it was skipped'}"
        raise StopRun(f"stopped by {name} at step {self.step}, {kept}: repeat the command to go on", number)


def train_step(stage: Stage, batch: Batch, factor: float) -> dict[str, Tensor]:
    """Update the weights once.

    Args:
        stage: the stage.
        batch: this rank's share of the global batch.
        factor: fraction of the peak learning rates.

    Returns:
        What the stage reports, with the gradient norm before clipping and the highest learning rate.
    """
    with unasked():
        stage.optimizer.zero_grad()
        metrics = stage.step(batch)
        grad_norm = stage.optimizer.step(factor, metrics.get("loss"))
    return {**metrics, "grad_norm": grad_norm, "lr": torch.tensor(stage.optimizer.highest_lr)}


def open_stream(
    config: Config,
    spec: SampleSpec,
    *,
    rank: int,
    size: int,
    position: Position | None = None,
    sources: Sequence[Source] | None = None,
) -> Stream:
    """Open the training samples of one of `size` readers, where an earlier stream stood or at the beginning."""
    return Stream(
        config.data,
        spec,
        global_batch=config.train.global_batch,
        seed=config.run.seed,
        rank=rank,
        size=size,
        position=position,
        sources=sources,
    )


def train_stage(config: Config, build: Callable[[Config, Ranks], Stage]) -> None:
    """Run a training stage from start to end, as one rank of it.

    Args:
        config: the stage's configuration.
        build: makes the stage, with weights drawn from the seed.
    """
    started = time.perf_counter()
    if config.train.deterministic:
        compute_deterministically()
    steps = config.train.profiled
    callbacks = [*([Profiler(steps)] if steps else []), *load_callbacks(config.train.callbacks)]
    with open_run(config) as (ranks, pulse, run), host_memory(config, run, ranks) as memory:
        if memory is None or memory.find(ranks.share(store.newest_step(run))) is None:
            recover(run, ranks, strict=config.checkpoint.strict)
        config = with_its_start(config, run)
        # Before the model is built, which may take long.
        for doubt in doubts(config, ranks.world_size) if ranks.main and store.latest(run) is None else []:
            print(f"warning: {doubt}", flush=True)
        pulse.at("finding the shards", long=True)
        sources = share_sources(config, ranks)
        pulse.at("building the model", long=True)
        trainer = Trainer(build(config, ranks), config, run, ranks, pulse, memory, sources, callbacks)
        with tracked(trainer.tracker):
            trainer.tracker.message(f"run folder: {run}")
            if memory is not None and memory.meta is not None:
                trainer.tracker.message(f"goes on at step {trainer.step}, from the memory of the hosts")
            elif trainer.step and trainer.parent:
                trainer.tracker.message(f"goes on at step {trainer.step}, begun from {trainer.parent}")
            trainer.tell_news()
            if ranks.main:
                trainer.tracker.inputs([*training_inputs(config, sources), *test_inputs(config)])
            trainer.train()
            pulse.at("finishing", long=True)
            metrics = trainer.finish()
            write_result(run, config, metrics, started, ranks)
    register_clip(config, run, store.latest(run), ranks)
