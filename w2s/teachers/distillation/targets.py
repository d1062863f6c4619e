"""Normalisation of the teacher's features as targets."""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.teachers.distillation.phi_s import PhiS


def target_norm(width: int, kind: Literal["none", "standardize", "layernorm", "phi_s"]) -> "TargetNorm | PhiS":
    """Return what makes targets of features of `width` channels.

    Raises:
        ConfigError: `phi_s` of so many channels.
    """
    return PhiS(width) if kind == "phi_s" else TargetNorm(width, kind)


class TargetNorm(nn.Module):
    """Targets as they are (`none`), standardised (`standardize`), or each through a layer norm (`layernorm`).

    The layer norm has no weights (data2vec, Baevski et al. 2022, section 3.3). Standardisation is per channel with the
    statistics of all batches so far: float64 buffers, merged with the parallel update of Chan, Golub and LeVeque
    (1983). They are part of `state_dict()`, so a resumed run continues with the same bits, and equal on all ranks.

    Attributes:
        mean: running mean [D].
        deviations: running sum of squared deviations from the mean [D].
        count: feature vectors seen, a scalar.
    """

    mean: Tensor
    deviations: Tensor
    count: Tensor

    def __init__(self, width: int, kind: Literal["none", "standardize", "layernorm"], eps: float = 1e-6) -> None:
        """Normalise targets of `width` channels; `eps` is added to the variance."""
        super().__init__()
        self.kind = kind
        self.eps = eps
        if kind == "standardize":
            self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
            self.register_buffer("deviations", torch.zeros(width, dtype=torch.float64))
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @property
    def ready(self) -> bool:
        """Whether targets can be normalised without an update: `standardize` needs a first one."""
        return self.kind != "standardize" or bool(self.count)

    @torch.no_grad()
    def forward(self, targets: Tensor, group: dist.ProcessGroup | None = None, *, update: bool) -> Tensor:
        """Normalise targets [n, P, D] (float32 in, float32 out).

        Args:
            targets: the teacher's features of this rank.
            group: ranks whose targets count together when the statistics are updated; None for this process alone.
            update: take these targets into the statistics first.

        Raises:
            ValueError: there are no statistics yet and `update` is false.
        """
        if self.kind == "none":
            return targets
        if self.kind == "layernorm":
            return F.layer_norm(targets, targets.shape[-1:], eps=self.eps)
        if update:
            self._update(targets.flatten(0, 1), group)
        elif not self.ready:
            raise ValueError("TargetNorm has seen no targets: call it with update=True first")
        scale = (self.deviations / self.count + self.eps).rsqrt()
        return (targets - self.mean.float()) * scale.float()

    def _update(self, features: Tensor, group: dist.ProcessGroup | None) -> None:
        """Merge `features` [m, D] of all ranks; sums are taken around the running mean, so nothing cancels."""
        shift = self.mean.float()
        shifted = features - shift
        parts = [shifted.sum(0, dtype=torch.float64), shifted.square().sum(0, dtype=torch.float64)]
        sums = torch.cat([*parts, self.count.new_full((1,), len(features))])
        if group is not None and group.size() > 1:
            dist.all_reduce(sums, group=group)
        first, second, new = sums[: features.shape[1]], sums[features.shape[1] : -1], sums[-1]
        # Where no rank has features, all sums are 0, and nothing changes.
        total, divisor = (self.count + new).clamp_min(1), new.clamp_min(1)
        step = shift.double() + first / divisor - self.mean
        self.deviations += second - first.square() / divisor + step.square() * self.count * new / total
        self.mean += step * new / total
        self.count += new
