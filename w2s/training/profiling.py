"""A profile of some training steps: `train.profile=10-15`."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from w2s import compat
from w2s.training.callbacks import Callback, Training

_OPERATORS = 60
"""Operators in the table, those that take the most time."""
_ALLOCATIONS = 200_000
"""Most events of CUDA's allocator that a snapshot goes back."""


class Profiler(Callback):
    """Profiles some steps on the ranks of the first data-parallel replica.

    `profile/` in the run folder gets from each of them, and MLflow from the main rank:

    - `steps-A-B.rank-R.trace.json.gz`: what ran when, on the host and the GPU, for Perfetto (ui.perfetto.dev);
    - `steps-A-B.rank-R.operators.txt`: time and memory by operator;
    - `steps-A-B.rank-R.memory.pickle`, on a GPU: what every allocation was for, for pytorch.org/memory_viz.
    """

    def __init__(self, steps: range) -> None:
        """Profile `steps`; a run that resumes or ends among them profiles those that it takes, as A and B then say."""
        self._steps, self._taken = steps, range(0)
        self._profile: profile | None = None

    def begin(self, training: Training) -> None:
        """Note where files go."""
        self._training = training

    def before_step(self, step: int) -> None:
        """Start with the first of the steps."""
        if self._profile is None and step in self._steps and self._training.ranks.data_rank == 0:
            on_gpu = self._training.ranks.device.type == "cuda"
            if on_gpu:
                compat.record_cuda_memory(_ALLOCATIONS)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()
            self._taken = range(step, step + 1)

    def after_step(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Write what there is after the last of the steps."""
        if self._profile is not None:
            # After a rollback steps before the first one are taken too.
            self._taken = range(min(self._taken.start, step), max(self._taken.stop, step + 1))
        if step == self._steps[-1]:
            self.end()

    def end(self) -> None:
        """Write what there is; a full disk is no reason to end a run, or to hide why it ended."""
        if self._profile is None:
            return
        profiled, self._profile = self._profile, None
        profiled.stop()
        folder, tracker = self._training.folder / "profile", self._training.tracker
        try:
            self._write(profiled, folder)
        except OSError as error:
            tracker.message(f"warning: the profile cannot be written to {folder}: {error}")
            return
        for path in sorted(folder.glob("*")):
            tracker.artifact(path, "profile")
        tracker.message(f"profile of steps {self._taken.start} to {self._taken[-1]}: {folder}")

    def _write(self, profiled: profile, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        ranks = self._training.ranks
        stem, kind = f"steps-{self._taken.start}-{self._taken[-1]}.rank-{ranks.rank}", ranks.device.type
        profiled.export_chrome_trace(str(folder / f"{stem}.trace.json.gz"))
        table = profiled.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=_OPERATORS)
        (folder / f"{stem}.operators.txt").write_text(table, encoding="utf-8")
        if kind == "cuda":
            compat.write_cuda_memory(str(folder / f"{stem}.memory.pickle"))
            compat.record_cuda_memory(None)
