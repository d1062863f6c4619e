"""Zero-shot classification: the class whose name is nearest to the image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from w2s.evaluation.batched_features import Encoder, TensorItems, Tokenizer, encode_all, score_all
from w2s.evaluation.scores.ranking import one_hot, rank_of_right

Template = Callable[[str], str]
"""Makes a prompt of a class name."""

BLOCK = 1024
"""Images whose scores are in memory at a time."""


@dataclass(frozen=True)
class ClassResult:
    """How the images of one class fared."""

    name: str
    images: list[int]
    """Numbers of its images in the test set."""
    top1: float
    """Fraction of them whose nearest class name is this one."""
    margin: float
    """Mean cosine with this class minus that with the nearest other one."""
    confused_with: str
    """The wrong class that they are taken for most often; empty where there is none."""


@dataclass(frozen=True)
class ZeroShotResult:
    """Metrics as fractions of 1, and what pictures need."""

    metrics: dict[str, float]
    """top1, top5, mean_per_class (mean over the classes that have images), chance_top1, chance_top5."""
    predictions: Tensor
    """int64 [n] on the CPU: the nearest class of every image."""
    classes: list[ClassResult]
    """Classes that have images, from the best to the worst (by top-1, then by margin)."""


def templates_of(name: Literal["none", "simple", "openai"]) -> Sequence[Template]:
    """Return the prompts of `eval.templates`: the bare class name, or CLIP's seven or eighty for ImageNet."""
    if name == "none":
        return (str,)
    # Importing open_clip takes seconds, and few evaluations need it.
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    return OPENAI_IMAGENET_TEMPLATES if name == "openai" else SIMPLE_IMAGENET_TEMPLATES


def class_embeddings(
    names: list[str],
    *,
    templates: Sequence[Template],
    encode_text: Encoder,
    tokenize: Tokenizer,
    batch_size: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """One vector a class: the mean of its prompts' normalised features, normalised again (as CLIP does).

    Args:
        names: the C class names.
        templates: what makes the prompts of a name.
        encode_text: tokens [b, context] to features [b, d].
        tokenize: texts to tokens.
        batch_size: texts of one call of `encode_text`.
        group: ranks that share the work; None for this process alone.

    Returns:
        float32 [C, d].
    """
    prompts = [template(name) for name in names for template in templates]
    features = F.normalize(encode_all(encode_text, TensorItems(tokenize(prompts)), batch_size, group).float(), dim=-1)
    return F.normalize(features.unflatten(0, (len(names), -1)).mean(1), dim=-1)


def zero_shot(
    image_features: Tensor,
    classes: Tensor,
    labels: Tensor,
    names: list[str],
    group: dist.ProcessGroup | None = None,
) -> ZeroShotResult:
    """Classify images by the cosine with class vectors; of equal cosines the lower class number wins.

    Args:
        image_features: [n, d], not normalised.
        classes: normalised class vectors [C, d], float32.
        labels: int64 [n], the true classes.
        names: the C class names.
        group: ranks that share the work; None for this process alone.
    """
    truth = labels.to(classes.device)
    scored = score_all(
        lambda indices: _classify(image_features[indices], classes, truth[indices]), image_features, BLOCK, group
    ).cpu()
    ranks, predictions, margins = scored[:, 0].long(), scored[:, 1].long(), scored[:, 2].float()
    results = _class_results(ranks, predictions, margins, labels.cpu(), names)
    metrics = {
        "top1": _mean(ranks < 1),
        "top5": _mean(ranks < 5),
        "mean_per_class": sum(result.top1 for result in results) / len(results),
        "chance_top1": 1 / len(names),
        "chance_top5": min(5, len(names)) / len(names),
    }
    return ZeroShotResult(metrics, predictions, results)


def _classify(image_features: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """Rank of the true class, nearest class, and margin of the true class over the nearest other one: double [n, 3]."""
    scores = F.normalize(image_features.float(), dim=-1) @ classes.T
    right = one_hot(labels, len(classes))
    others = scores.masked_fill(right, -torch.inf).amax(1)
    margins = scores.gather(1, labels[:, None])[:, 0] - others
    return torch.stack([part.double() for part in (rank_of_right(scores, right), scores.argmax(1), margins)], 1)


def _class_results(
    ranks: Tensor, predictions: Tensor, margins: Tensor, labels: Tensor, names: list[str]
) -> list[ClassResult]:
    results = []
    for label in labels.unique().tolist():
        images = (labels == label).nonzero()[:, 0]
        wrong = predictions[images][ranks[images] > 0]
        results.append(
            ClassResult(
                name=names[label],
                images=images.tolist(),
                top1=_mean(ranks[images] < 1),
                margin=margins[images].mean().item(),
                confused_with=names[int(wrong.mode().values)] if len(wrong) else "",
            )
        )
    return sorted(results, key=lambda result: (-result.top1, -result.margin))


def _mean(hits: Tensor) -> float:
    return hits.double().mean().item()
