"""The summary loss: how far a student's embedding of an image points away from its teacher's."""

import torch.nn.functional as F
from torch import Tensor

from w2s.objectives.masked_loss import weighted


def summary_loss(predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the negative mean cosine of embeddings, in float32; lengths do not matter, so targets need no norm.

    Args:
        predictions: the student's [n, d].
        targets: the teacher's [n, d].
        weights: [n] of the samples, see `weighted`.
    """
    return -weighted(F.cosine_similarity(predictions.float(), targets.float(), dim=-1), weights).mean()
