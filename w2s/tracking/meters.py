"""Speed, waiting and memory of the training loop."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch


class StepMeter:
    """Measures the steps between two readings.

    The clock runs from one reading to the next, since work on a GPU ends long after the call that started it; what is
    no training, such as an evaluation, goes inside `paused`.

    Args:
        device: device whose peak memory is read.
        clock: seconds that only ever grow.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._clock = clock
        self._restart(0.0)

    def _restart(self, wait_seconds: float) -> None:
        self._started = self._clock()
        self._steps = 0
        self._samples = 0
        self._wait_before = self._wait = wait_seconds

    def update(self, samples: int, wait_seconds: float) -> None:
        """Counts a step.

        Args:
            samples: samples of the step over all ranks.
            wait_seconds: seconds that the loop has waited for data since it began (a total, as the data stream keeps).
        """
        self._steps += 1
        self._samples += samples
        self._wait = wait_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside the block out of the measure."""
        paused_at = self._clock()
        try:
            yield
        finally:
            self._started += self._clock() - paused_at

    def read(self) -> dict[str, float]:
        """The figures since the last reading.

        Returns:
            `samples_per_second` (over all ranks), `seconds_per_step`, `data_wait` (fraction of the time spent waiting
            for data) and `memory_gib` (peak since the process began). Nothing is returned for no steps.
        """
        if self._steps == 0:
            return {}
        seconds = max(self._clock() - self._started, 1e-9)
        figures = {
            "samples_per_second": self._samples / seconds,
            "seconds_per_step": seconds / self._steps,
            "data_wait": min((self._wait - self._wait_before) / seconds, 1.0),
            "memory_gib": peak_memory_gib(self._device),
        }
        self._restart(self._wait)
        return figures


def over_ranks(figures: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Compare ranks.

    Args:
        figures: what `StepMeter.read` gave on each rank, by rank.
        names: what to compare.

    Returns:
        `ranks/NAME_min`, `_median` and `_max`, and in `_slowest` the number of the rank with the maximum; nothing of
        one rank.
    """
    if len(figures) == 1 or not all(figures):
        return {}
    compared: dict[str, float] = {}
    for name in names:
        values = [each[name] for each in figures]
        compared |= {
            f"ranks/{name}_min": min(values),
            f"ranks/{name}_median": median(values),
            f"ranks/{name}_max": max(values),
            f"ranks/{name}_slowest": float(values.index(max(values))),
        }
    return compared


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far in GiB: what PyTorch allocated on a GPU, otherwise the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB, on a Mac in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
