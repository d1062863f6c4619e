"""The summary loss: how far a student's embedding of an image points away from its teacher's."""

import torch.nn.functional as F
from torch import Tensor


def summary_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the negative mean cosine of embeddings, in float32; lengths do not matter, so targets need no norm.

    Args:
        predictions: the student's [n, d].
        targets: the teacher's [n, d].
    """
    return -F.cosine_similarity(predictions.float(), targets.float(), dim=-1).mean()
