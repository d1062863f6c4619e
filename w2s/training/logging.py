"""The callback that logs, and repeats a step that was skipped to find out why."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from w2s.data.samples.batch import Batch
from w2s.data.shards.sizes import Counting, count_samples
from w2s.megatron.fp8.fp8_stats import fp8_metrics
from w2s.megatron.parallel import process_groups
from w2s.tracking.meters import over_ranks
from w2s.training.callbacks import Callback, Training
from w2s.training.replay import clones, replay
from w2s.training.training_run import RollBack, TrainingRun


class Logging(Callback):
    """Tells the tracker what a run begins with, and how it continues where a line is due.

    There a step that was skipped since the last line is repeated, and the run rolls back after too many of them.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._counting: Counting | None = None
        # Fully sharded, no rank has gradients of its own to compare: nothing is repeated.
        self._repeats = run.config.parallel.shard != "full"
        self._batches: list[Batch] = []
        self._before: dict[str, Tensor] = {}

    def begin(self, training: Training) -> None:
        """Show which weights were taken over, and which sources are read."""
        handover = self._run.handover
        if handover is not None:
            training.tracker.table("handover", ["", "tensors", "names"], handover.rows(), handover.title)
        if training.ranks.main:
            self._show_sources()

    def before_step(self, step: int) -> None:
        """Keep what a repetition of the step needs."""
        if self._run.is_logged(step):
            self._before = clones(self._run.stage.extra_state())

    def after_step(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Log if it is time: the only place in the loop that waits for the device."""
        run = self._run
        if self._repeats:
            self._batches.append(run.batch)
        if not run.is_logged(step):
            return
        metrics = self._replay() or metrics
        self._batches.clear()
        self._log(metrics, run.meter.read())
        # A run ends with a good step only.
        skipped, most = run.skipped_in_a_row(), run.config.train.bad_steps if step < run.config.train.steps else 1
        if skipped >= most:
            raise RollBack(f"loss or gradient norm of the last {skipped} steps was not a number, or a spike")

    def _show_sources(self) -> None:
        """Show what is read, and begin to count what nobody has counted."""
        run, index = self._run, Path(self._run.config.data.index)
        sizes = {source.name: count_samples(source.shards, index) for source in run.sources}
        rows = run.stream.source_rows(sizes)
        run.tracker.table("sources", ["source", "shards", "samples", "weight"], rows, "training data")
        unknown = {source.name: source.shards for source in run.sources if sizes[source.name] is None}
        self._counting = Counting(unknown, index) if unknown else None

    def _replay(self) -> dict[str, Tensor] | None:
        """Say whose fault it is that one of the steps since the last line was skipped, if one was.

        Where it was the last step and the fault has passed, the step is taken after all.
        """
        run, batches = self._run, self._batches
        since = int(run.stage.optimizer.guard.since)
        if since >= len(batches):
            return None
        run.heartbeat.at("repeating a bad step", run.step, long=True)
        diagnosis = replay(run.stage, batches[-1 - since], run.ranks)
        again = diagnosis.passing and not since
        when = f" at step {run.step}" if since else ""
        words = f"{diagnosis.words}{'; the step is taken again' if again else ''}"
        run.tracker.message(f"warning: step {run.step - since} was skipped; repeated{when}, it is {words}")
        return run.retake_step(batches[-1], self._before) if again else None

    def _log(self, metrics: Mapping[str, Tensor], figures: Mapping[str, float]) -> None:
        """Average over the ranks."""
        run = self._run
        local = run.ranks.to_floats(metrics), run.fp8_stats.read(), figures, run.stream.counts()
        reported, counts, gathered, read = zip(*run.ranks.gather(local), strict=True)
        averages = without_silent_teachers(process_groups.means(reported)) | fp8_metrics(counts)
        skipped = int(run.stage.optimizer.guard.skipped) + run.undone
        if skipped:
            averages["skipped_steps"] = skipped
        compared = over_ranks(gathered, ("seconds_per_step", "data_wait"))
        logged = {**averages, **figures, **compared, **run.stream.metrics(process_groups.sums(read))}
        run.tracker.log(run.step, run.samples, logged)
        for callback in run.callbacks:
            callback.logged(run.step, logged)
        for line in self._counting.news() if self._counting else ():
            run.tracker.message(f"counted: {line}")


def without_silent_teachers(averages: Mapping[str, float]) -> dict[str, float]:
    """Leave out what a teacher without a sample in the step would have, zeros; its share, 0, says so."""
    shares = {name for name in averages if name.endswith("/share")}
    silent = tuple(name.removesuffix("share") for name in shares if averages[name] == 0)
    return {name: value for name, value in averages.items() if name in shares or not name.startswith(silent)}
