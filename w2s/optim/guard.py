"""Steps that are not taken: the gradient norm is not a number, or far above those of the steps before."""

from collections.abc import Mapping

import torch
from torch import Tensor

_NORMAL = 1.4826
"""Standard deviation of a normal distribution by its median absolute deviation."""
_NEVER = 1 << 40
_LEAST_DEVIATION = 0.05
"""The deviation is at least this share of the median: norms that hardly vary make no spike of a slightly larger one."""


class StepGuard:
    """Judges every step by its gradient norm and counts what is skipped; nothing is read back from a GPU.

    A norm is a spike where it exceeds the median of the last `window` norms by more than `deviations` times their
    standard deviation, taken from the median absolute deviation, which spikes themselves do not move. Until half of the
    window is filled none is a spike.

    Args:
        window: norms that are remembered.
        deviations: standard deviations above the median that are still good; 0 knows no spikes.
        device: where the norms come from.

    Attributes:
        skipped: steps that were not taken, int64.
        consecutive_skips: those of them since the last one that was, int64.
        since: steps since the last one that was not taken, int64; very many where there was none.
    """

    def __init__(self, window: int, deviations: float, device: torch.device) -> None:
        self._deviations = deviations
        self._norms = torch.full((window,), torch.inf, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped, self.consecutive_skips = torch.zeros_like(self._seen), torch.zeros_like(self._seen)
        self.since = torch.full_like(self._seen, _NEVER)

    @property
    def device(self) -> torch.device:
        """Where the norms come from."""
        return self._norms.device

    def check(self, norm: Tensor) -> Tensor:
        """Whether a step with this gradient norm is to be taken; scalars on the device."""
        finite = norm.isfinite()
        good = finite & ~self._is_spike(norm) if self._deviations else finite
        # Spikes are remembered too: should the norms stay there, they are not spikes for long.
        slot = (self._seen % len(self._norms)).view(1)
        self._norms.index_copy_(0, slot, torch.where(finite, norm, self._norms.index_select(0, slot)))
        self._seen += finite
        self.skipped += ~good
        self.consecutive_skips.copy_(torch.where(good, 0, self.consecutive_skips + 1))
        self.since.copy_(torch.where(good, self.since + 1, 0))
        return good

    def clear_skipped(self) -> None:
        """Count the last step, which was skipped, no more; its norm stays among those that are remembered."""
        self.skipped -= 1
        self.consecutive_skips -= 1
        self.since.fill_(_NEVER)

    def _is_spike(self, norm: Tensor) -> Tensor:
        median = self._median(self._norms)
        deviation = (_NORMAL * self._median((self._norms - median).abs())).clamp(min=_LEAST_DEVIATION * median)
        enough = self._seen >= (len(self._norms) + 1) // 2
        return enough & (norm > median + self._deviations * deviation)

    def _median(self, values: Tensor) -> Tensor:
        """The median of the slots that are filled: the others hold infinity, and are last."""
        middle = (self._seen.clamp(1, len(values)) - 1) // 2
        return values.sort().values.index_select(0, middle.view(1)).squeeze(0)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold; equal on all ranks."""
        return {"norms": self._norms, "seen": self._seen, "skipped": self.skipped, "in_a_row": self.consecutive_skips}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave; norms of another window are forgotten."""
        self.skipped.copy_(state["skipped"])
        self.consecutive_skips.copy_(state["in_a_row"])
        if state["norms"].shape == self._norms.shape:
            self._norms.copy_(state["norms"])
            self._seen.copy_(state["seen"])
