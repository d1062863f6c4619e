"""The losses of the masked stage: how far the student's predictions are from the teacher's features."""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor


def masked_cosines(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the cosine of each prediction [m, d] and its target [m, d], in float32: [m]."""
    return F.cosine_similarity(predictions.float(), targets.float(), dim=-1)


def constant_cosine(targets: Tensor) -> Tensor:
    """Return the mean cosine with targets [m, d] of the best prediction that is the same everywhere, a scalar.

    The mean cosine of a constant c is (c / |c|) . m with m the mean of the normalised targets. By Cauchy and Schwarz
    that is at most |m|, which c = m attains.
    """
    return F.normalize(targets.float(), dim=-1).mean(0).norm()


def masked_cosine_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the negative mean cosine over masked patches (baaivision/EVA, EVA-01/eva/engine_for_pretraining.py).

    Args:
        predictions: [m, d] at masked patches.
        targets: [m, d], the teacher's features there.
    """
    return -masked_cosines(predictions, targets).mean()


def smooth_l1_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over patches and channels of e^2 / 2 where the error e is below 1 and |e| - 1/2 elsewhere.

    It is that of data2vec (Baevski et al. 2022, section 3.4) with beta 1; shapes as in `masked_cosine_loss`.
    """
    return F.smooth_l1_loss(predictions.float(), targets.float())


def mse_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over patches and channels of the squared error; shapes as in `masked_cosine_loss`."""
    return F.mse_loss(predictions.float(), targets.float())


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": masked_cosine_loss,
    "smooth_l1": smooth_l1_loss,
    "mse": mse_loss,
}
"""By their names in `mim.loss`."""
