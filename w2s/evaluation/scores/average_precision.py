"""Average precision of multi-label classification: images with several classes, ranked for each class by its score."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from w2s.evaluation.batched_features import score_all


def mean_average_precision(
    image_features: Tensor, classes: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Rank all images by the cosine with each class vector, and average the precision at those that have the class.

    The mean is over the classes that images have. Of equal cosines the earlier image stands first.

    Args:
        image_features: [n, d], not normalised.
        classes: normalised class vectors [C, d], float32.
        labels: bool [n, C], the classes of each image.
        group: ranks that share the work; None for this process alone.

    Returns:
        mean_average_precision, and chance_mean_average_precision, the mean share of images that have a class; fractions
        of 1.
    """
    images, labels = F.normalize(image_features.float(), dim=-1), labels.to(classes.device)
    present = labels.any(0).nonzero()[:, 0]

    def score(indices: Tensor) -> Tensor:
        (label,) = present[indices].tolist()
        return _average_precision(images @ classes[label], labels[:, label])[None, None]

    # A class at a time: the scores of all of them would be as large as the set.
    precisions = score_all(score, present, 1, group)
    return {
        "mean_average_precision": precisions.mean().item(),
        "chance_mean_average_precision": labels[:, present].double().mean().item(),
    }


def _average_precision(scores: Tensor, right: Tensor) -> Tensor:
    hits = right[scores.argsort(descending=True, stable=True)]
    precision = hits.double().cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)
    return precision[hits].mean()
