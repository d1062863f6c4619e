"""The masked-feature loss: how far the student's predictions point away from the teacher's features."""

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
