"""Images classified by the features of labelled ones: k-NN and a linear probe."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from w2s.errors import DataError
from w2s.evaluation.dataset import EvalSet
from w2s.evaluation.scores.knn import knn
from w2s.evaluation.scores.linear_probe import LinearProbe


@dataclass(frozen=True)
class Gallery:
    """A labelled set and its features, which other images are classified by."""

    data: EvalSet
    features: Tensor
    """What neighbours are found by, [m, w]."""
    probe: LinearProbe | None = None
    """Trained on the set, if it is wanted."""


def in_common(tests: Iterable[EvalSet], neighbours: EvalSet) -> bool:
    """Whether images of any test set have a class of the labelled images.

    Raises:
        DataError: the labelled images have no class each.
    """
    if neighbours.labels is None or neighbours.labels.ndim > 1:
        raise DataError("eval.knn_shards has no class for each image, but several or captions: give class numbers")
    return any(bool((matched(data, neighbours) >= 0).any()) for data in tests)


def evaluate_by_gallery(
    data: EvalSet,
    gallery: Gallery,
    *,
    features: Tensor,
    probed: Tensor,
    k: int,
    group: dist.ProcessGroup | None = None,
) -> dict[str, dict[str, float]]:
    """k-NN classification and, if there is one, the linear probe; classes are matched by their names.

    Test images of classes that the gallery lacks are left out; `coverage` is the fraction that remains. A set of which
    nothing remains has a coverage of 0 and no other metric.

    Args:
        data: the test set.
        gallery: the labelled set.
        features: what neighbours are found by, [n, w].
        probed: what the linear probe sees, [n, d].
        k: neighbours that vote.
        group: ranks that have the same features and share the scoring; None for this process alone.

    Returns:
        for `knn` top1, top5, chance_top1 and coverage, for `linear_probe` also mean_per_class and the inverse of the
        chosen regularisation; fractions of 1.
    """
    labels = matched(data, gallery.data)
    kept = labels >= 0
    coverage = {"coverage": kept.double().mean().item()}
    measured = {"knn": coverage.copy()}
    if gallery.probe:
        measured["linear_probe"] = coverage.copy()
    if kept.any() and gallery.data.labels is not None:
        measured["knn"] |= knn(features[kept], labels[kept], gallery.features, gallery.data.labels, k=k, group=group)
        if gallery.probe:
            measured["linear_probe"] |= gallery.probe.metrics(probed[kept], labels[kept], group)
    return measured


def matched(data: EvalSet, neighbours: EvalSet) -> Tensor:
    """The class number that each test image has among the neighbours, int64 [n]; -1 where they lack its class."""
    if data.labels is None or data.labels.ndim > 1 or neighbours.labels is None:
        return torch.full((len(data),), -1)
    by_name = {neighbours.class_names[label]: label for label in neighbours.labels.unique().tolist()}
    return torch.tensor([by_name.get(data.class_names[label], -1) for label in data.labels.tolist()])
