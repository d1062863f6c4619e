"""Linear probe: multinomial logistic regression on frozen features, its regularisation chosen on held-out images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from w2s.evaluation.batched_features import score_all
from w2s.evaluation.scores.ranking import one_hot, rank_of_right

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
"""Images that are classified at a time."""

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

    def metrics(self, features: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Classify features.

        Args:
            features: [n, d], not normalised.
            labels: int64 [n].
            group: ranks that share the work; None for this process alone.

        Returns:
            top1, top5, mean_per_class (over the classes that there are) and inverse_strength; fractions of 1.
        """
        labels = labels.to(features.device)

        def score(indices: Tensor) -> Tensor:
            return rank_of_right(self.scores(features[indices]), one_hot(labels[indices], len(self.bias)))[:, None]

        ranks = score_all(score, features, BLOCK, group)[:, 0]
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
    features: Tensor, labels: Tensor, *, rank: int = 0, size: int = 1, gather: Gather = lambda local: [local]
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
    labels = labels.to(features.device)
    held_out = _held_out(labels)
    order = torch.cat([(~held_out).nonzero(), held_out.nonzero()])[:, 0]
    kept, classes = int((~held_out).sum()), int(labels.max()) + 1
    inputs, labels = features[order].float(), labels[order]  # the one copy of the features, which is changed in place
    inputs.div_(inputs.norm(dim=1, keepdim=True).clamp_min_(1e-12))
    # The bias takes up the mean, and the weights the scale: both change the number of iterations alone.
    centre = inputs.mean(0)
    scale = inputs.sub_(centre).norm().div(math.sqrt(len(inputs))).clamp_min(1e-12)
    inputs.div_(scale)

    def fit(count: int, strength: float) -> tuple[Tensor, Tensor]:
        """Train on the first images."""
        return _fit(inputs[:count], labels[:count], classes, 0.5 / (strength * count * scale.square()))

    def rights(strengths: Sequence[float]) -> dict[float, int]:
        """Right answers on the held-out images by the inverse strength."""
        correct = {}
        for strength in strengths[rank::size]:
            weight, bias = fit(kept, strength)
            blocks = zip(inputs[kept:].split(BLOCK), labels[kept:].split(BLOCK), strict=True)
            correct[strength] = sum(int((F.linear(x, weight, bias).argmax(1) == y).sum()) for x, y in blocks)
        return {strength: count for part in gather(correct) for strength, count in part.items()}

    counts = rights(COARSE)
    best = _best(counts)
    counts |= rights([best * factor for factor in FINE])
    weight, bias = fit(len(inputs), _best(counts))
    return LinearProbe(weight / scale, bias, centre, _best(counts))


def _best(counts: dict[float, int]) -> float:
    return min(counts, key=lambda strength: (-counts[strength], abs(math.log(strength))))


def _held_out(labels: Tensor) -> Tensor:
    """Bool [n]: every tenth image, counted class by class."""
    held_out = torch.zeros_like(labels, dtype=torch.bool)
    held_out[labels.argsort(stable=True)[HELD_OUT // 2 :: HELD_OUT]] = True
    return held_out


def _fit(inputs: Tensor, labels: Tensor, classes: int, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross entropy + decay |W|^2, block by block: a step needs no memory beyond the inputs."""
    weight = torch.zeros(classes, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=TOLERANCE, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = decay * weight.square().sum()
        loss.backward()
        for block, truth in zip(inputs.split(BLOCK), labels.split(BLOCK), strict=True):
            part = F.cross_entropy(F.linear(block, weight, bias), truth, reduction="sum") / len(inputs)
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()
