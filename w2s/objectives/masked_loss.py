"""The losses of the masked stage: how far the student's predictions are from the teacher's features."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from w2s.config.imported import imported


def masked_cosines(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the cosine of each prediction [..., d] and its target [..., d], in float32: [...]."""
    return F.cosine_similarity(predictions.float(), targets.float(), dim=-1)


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Multiply what belongs to samples [n, ...] with their weights [n]; without weights each counts alike.

    Weights whose mean over a global batch is 1 make a mean of it, of the means over equally large parts too.
    """
    return values if weights is None else values * weights.view(-1, *[1] * (values.ndim - 1))


def constant_cosine(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean cosine with targets [n, ..., d] of the best prediction that is the same everywhere, a scalar.

    The mean cosine of a constant c is (c / |c|) . m with m the mean of the normalised targets. By Cauchy and Schwarz
    that is at most |m|, which c = m attains. For `weights` see `weighted`.
    """
    directions = weighted(F.normalize(targets.float(), dim=-1), weights)
    return directions.flatten(0, -2).mean(0).norm()


def masked_cosine_loss(predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the negative mean cosine over masked patches (baaivision/EVA, EVA-01/eva/engine_for_pretraining.py).

    Args:
        predictions: [n, ..., d] at masked patches, or the summaries [n, d].
        targets: [n, ..., d], the teacher's features there.
        weights: [n] of the samples, see `weighted`.
    """
    return -weighted(masked_cosines(predictions, targets), weights).mean()


def smooth_l1_loss(predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean over patches and channels of e^2 / 2 where the error e is below 1 and |e| - 1/2 elsewhere.

    It is that of data2vec (Baevski et al. 2022, section 3.4) with beta 1; arguments as in `masked_cosine_loss`.
    """
    return _mean_error(F.smooth_l1_loss, predictions, targets, weights)


def mse_loss(predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean over patches and channels of the squared error; arguments as in `masked_cosine_loss`."""
    return _mean_error(F.mse_loss, predictions, targets, weights)


def _mean_error(error: Callable[..., Tensor], predictions: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return error(predictions.float(), targets.float())
    return weighted(error(predictions.float(), targets.float(), reduction="none"), weights).mean()


LOSSES = {"cosine": masked_cosine_loss, "smooth_l1": smooth_l1_loss, "mse": mse_loss}
"""By their names in `mim.loss`."""


def masked_loss(name: str) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return one of `LOSSES`, or one of the user's own, written `module:function`.

    Raises:
        ConfigError: that one cannot be imported.
    """
    return LOSSES[name] if name in LOSSES else imported("mim.loss", name)
