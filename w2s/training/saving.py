"""The callback that saves checkpoints."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from w2s.checkpoint.own import checkpoint_folders
from w2s.config.naming import written
from w2s.data.stream.position import merge_positions
from w2s.errors import CheckpointError
from w2s.megatron.checkpoint import state
from w2s.megatron.checkpoint.async_save import AsyncSave
from w2s.processes.liveness.heartbeat import WRITER
from w2s.training.callbacks import Callback
from w2s.training.training_run import TrainingRun

PACKAGES = ("w2s", "torch", "megatron-core")


class Saving(Callback):
    """Saves a checkpoint when one is due; training continues without one that the system refuses.

    Attributes:
        refused: why the last saves were refused, since the last that was not.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._saving: checkpoint_folders.Saving | None = None
        self.refused: list[CheckpointError] = []

    def after_step(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Save if it is time, finish what has been written, and at the end all."""
        run = self._run
        with run.meter.paused():
            if run.is_saved(step) and not run.skipped_in_a_row():  # otherwise the weights may be what is wrong
                self.save()
            self._finish_if_written()
            if step == run.config.train.steps:
                self.finish()

    def end(self) -> None:
        """End a writing process where the run fails: it would hold up the end of this one."""
        if self._saving is not None:
            self._saving.abandon()

    def save(self) -> None:
        """Save a checkpoint of this moment, in the memory of the hosts too where it is kept there."""
        run = self._run
        run.stage.optimizer.gather_weights()
        meta = self._meta()
        self._keep_in_memory(meta)
        self.finish()
        run.heartbeat.at("saving a checkpoint", run.step, long=True)
        with self._training_on_if_refused(run.step):
            self._saving = checkpoint_folders.Saving(run.folder, meta, self._write, run.config.checkpoint, run.ranks)
        if not run.config.checkpoint.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        run = self._run
        if self._saving is not None:
            run.heartbeat.at("finishing a checkpoint", run.step, awaits=WRITER, long=True)
            saving, self._saving = self._saving, None
            with self._training_on_if_refused(saving.step):
                checkpoint = saving.finish()
                run.tracker.note(checkpoint=str(checkpoint.absolute()))
                self.refused = []
                for callback in run.callbacks:
                    callback.saved(saving.step, checkpoint)
            run.heartbeat.helpers.pop(WRITER, None)

    def _meta(self) -> checkpoint_folders.Meta:
        run = self._run
        return checkpoint_folders.Meta(
            stage=run.config.stage,
            step=run.step,
            samples=run.samples,
            config=written(run.config),
            data=merge_positions(run.ranks.gather(run.stream.position())),
            parent=run.parent,
            mlflow_run_id=run.tracker.run_id,
            versions={package: version(package) for package in PACKAGES},
        )

    def _write(self, folder: Path) -> AsyncSave:
        run, stage = self._run, self._run.stage
        background = run.config.checkpoint.async_save
        saving = state.save(folder, stage.towers, stage.optimizer, stage.extra_state(), background)
        run.heartbeat.helpers[WRITER] = saving.writer_pids
        return saving

    def _keep_in_memory(self, meta: checkpoint_folders.Meta) -> None:
        run = self._run
        if run.memory is None:
            return
        run.heartbeat.at("keeping a checkpoint in memory", run.step, long=True)
        began = time.perf_counter()
        try:
            size = run.memory.keep(meta, run.own_tensors())
        except CheckpointError as error:
            run.tracker.message(f"warning: {error}; training continues")
            return
        seconds = time.perf_counter() - began
        if meta.step <= run.begun_at + run.config.checkpoint.every:  # once is enough
            run.tracker.message(f"step {meta.step} is in memory: {size / 2**30:.3g} GiB per rank in {seconds:.2g} s")

    @contextmanager
    def _training_on_if_refused(self, step: int) -> Iterator[None]:
        """Let the run continue without a step's checkpoint that the system refuses, as long as an older one stands."""
        run = self._run
        try:
            yield
        except CheckpointError as error:
            self.refused.append(error)
            standing, most = checkpoint_folders.latest(run.folder), run.config.checkpoint.failures
            if standing is None or len(self.refused) == most or step == run.config.train.steps:
                raise
            count = f"{len(self.refused)} of at most {most} in a row"
            run.tracker.message(f"warning: {error}; training continues, {standing.name} stands ({count})")

    def _finish_if_written(self) -> None:
        # As the others wait in `finish`, no rank may go there alone.
        if self._saving is not None and not self._run.ranks.any(not self._saving.written):
            self.finish()
