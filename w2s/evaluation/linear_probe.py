"""Linear probe: multinomial logistic regression on frozen features, its regularisation chosen on held-out images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from w2s.evaluation.ranking import one_hot, rank_of_right

COARSE = tuple(10.0**power for power in range(-6, 7))
"""Inverse strengths of the regularisation that are tried first, as CLIP's paper has them (Radford et al. 2021, A.3)."""
FINE = tuple(10 ** (third / 3) for third in (-2, -1, 1, 2))
"""Factors around the best of these that are tried then."""
HELD_OUT = 10
"""One of so many images chooses the regularisation."""
STEPS = 1000
"""L-BFGS iterations at most."""
TOLERANCE = 1e-5
"""Largest gradient at which they end."""
BLOCK = 8192
"""Images that are scored at a time."""

Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of features."""

    weight: Tensor
    """float32 [classes, d]."""
    bias: Tensor
    """float32 [classes]."""
    centre: Tensor
    """Mean of the normalised training features, float32 [d]."""
    inverse_strength: float
    """The chosen regularisation, C of scikit-learn's LogisticRegression."""

    def scores(self, features: Tensor) -> Tensor:
        """Logits [n, classes] of features [n, d], not normalised."""
        return (F.normalize(features.float(), dim=-1) - self.centre) @ self.weight.T + self.bias

    def metrics(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """Classify features.

        Args:
            features: [n, d], not normalised.
            labels: int64 [n].

        Returns:
            top1, top5, mean_per_class (over the classes that there are) and inverse_strength; fractions of 1.
        """
        labels = labels.to(features.device)
        blocks = zip(features.split(BLOCK), labels.split(BLOCK), strict=True)
        ranks = torch.cat([rank_of_right(self.scores(x), one_hot(y, len(self.bias))) for x, y in blocks])
        right = (ranks < 1).double()
        present, inverse = labels.unique(return_inverse=True)
        of_class = right.new_zeros(len(present)).scatter_add(0, inverse, right) / inverse.bincount()
        return {
            "top1": right.mean().item(),
            "top5": (ranks < 5).double().mean().item(),
            "mean_per_class": of_class.mean().item(),
            "inverse_strength": self.inverse_strength,
        }


def train_probe(
    features: Tensor, labels: Tensor, *, rank: int = 0, size: int = 1, gather: Gather = lambda own: [own]
) -> LinearProbe:
    """Train on L2-normalised features; every rank calls, and each tries some of the regularisations.

    The objective is that of scikit-learn's LogisticRegression, sum of cross entropies + |W|^2 / (2 C) without the bias,
    minimised by L-BFGS. C is the one with the most right answers on a held-out tenth, of equally good ones the one
    nearest to 1; then all images are trained on.

    Args:
        features: [n, d], not normalised, the same on every rank.
        labels: int64 [n].
        rank: this process among those that call.
        size: number of these.
        gather: gives what every one of them has found.
    """
    units, labels = F.normalize(features.float(), dim=-1), labels.to(features.device)
    held_out = _held_out(labels)
    classes = int(labels.max()) + 1

    def rights(strengths: Sequence[float]) -> dict[float, int]:
        """Right answers on the held-out images by the inverse strength."""
        found = {}
        for strength in strengths[rank::size]:
            probe = _fit(units[~held_out], labels[~held_out], classes, strength)
            found[strength] = int((probe.scores(units[held_out]).argmax(1) == labels[held_out]).sum())
        return {strength: count for part in gather(found) for strength, count in part.items()}

    counts = rights(COARSE)
    best = _best(counts)
    counts |= rights([best * factor for factor in FINE])
    return _fit(units, labels, classes, _best(counts))


def _best(counts: dict[float, int]) -> float:
    return min(counts, key=lambda strength: (-counts[strength], abs(math.log(strength))))


def _held_out(labels: Tensor) -> Tensor:
    """Bool [n]: every tenth image, counted class by class."""
    held_out = torch.zeros_like(labels, dtype=torch.bool)
    held_out[labels.argsort(stable=True)[HELD_OUT // 2 :: HELD_OUT]] = True
    return held_out


def _fit(units: Tensor, labels: Tensor, classes: int, inverse_strength: float) -> LinearProbe:
    # The bias takes up the mean, and the weights the scale: both change the number of iterations alone.
    centre = units.mean(0)
    scale = (units - centre).square().sum(1).mean().sqrt().clamp_min(1e-12)
    inputs = (units - centre) / scale
    weight = torch.zeros(classes, units.shape[1], device=units.device, requires_grad=True)
    bias = torch.zeros(classes, device=units.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=TOLERANCE, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )
    decay = 0.5 / (inverse_strength * len(units) * scale.square())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearProbe(weight.detach() / scale, bias.detach(), centre, inverse_strength)
