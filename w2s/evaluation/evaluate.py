"""The evaluations that stages ask for: a CLIP's features by texts, and a vision tower's by those of labelled images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from w2s.config.sections import EvalConfig, Resize
from w2s.errors import DataError
from w2s.evaluation.batched_features import Encoder, TensorItems, Tokenizer, encode_all
from w2s.evaluation.dataset import CLASS_NAMES, PROMPTS, EvalSet
from w2s.evaluation.scores.average_precision import mean_average_precision
from w2s.evaluation.scores.knn import knn
from w2s.evaluation.scores.linear_probe import LinearProbe
from w2s.evaluation.scores.retrieval import Captions, Found, first_found, retrieval, split_captions
from w2s.evaluation.scores.zero_shot import Template, ZeroShotResult, class_embeddings, templates_of, zero_shot

T = TypeVar("T")


@dataclass(frozen=True)
class Texts:
    """What a test set says in words, and its features."""

    classes: Tensor | None
    """Class vectors [C, d], normalised; None where the set has no classes."""
    captions: Captions | None
    """None where the set has no captions, or retrieval is not wanted."""
    features: Tensor | None
    """Those of the captions, [m, d]."""


@dataclass(frozen=True)
class ClipResult:
    """Metrics of a CLIP and what pictures need."""

    metrics: dict[str, float]
    """By MLflow name (`zero_shot/top1`, `retrieval/image_to_text_recall_at_1`, ...), fractions of 1."""
    zero_shot: ZeroShotResult | None
    """None where an image of the test set has no class, or several."""
    captions: Captions | None = None
    """The captions that were retrieved."""
    resize: Resize = "crop"
    """How the images were made square."""
    found: dict[str, list[Found]] = field(default_factory=dict)
    """What some queries found first, `image_to_text` and `text_to_image`."""


@dataclass(frozen=True)
class Gallery:
    """A labelled set and its features, which other images are classified by."""

    data: EvalSet
    features: Tensor
    """What neighbours are found by, [m, w]."""
    probe: LinearProbe | None = None
    """Trained on the set, if it is wanted."""


def encode_texts(
    config: EvalConfig,
    data: EvalSet,
    *,
    encode_text: Encoder,
    tokenize: Tokenizer,
    group: dist.ProcessGroup | None = None,
) -> Texts:
    """Features of a test set's class names, and of its captions where retrieval is wanted.

    Args:
        config: prompts, batch size, and whether to measure retrieval.
        data: the test set, the same on every rank.
        encode_text: tokens [b, context] to features [b, d].
        tokenize: texts to tokens.
        group: ranks that share the work; None for this process alone.
    """
    classes = captions = features = None
    if data.labels is not None:
        classes = class_embeddings(
            data.class_names,
            templates=_templates(config, data),
            encode_text=encode_text,
            tokenize=tokenize,
            batch_size=config.batch_size,
            group=group,
        )
    if config.retrieval and data.captions:
        captions = split_captions(data.captions, equal_is_right=config.equal_captions == "right")
        features = encode_all(encode_text, TensorItems(tokenize(captions.texts)), config.batch_size, group)
    return Texts(classes, captions, features)


def evaluate_clip(
    data: EvalSet, images: Tensor, texts: Texts, *, examples: int = 0, group: dist.ProcessGroup | None = None
) -> ClipResult:
    """Zero-shot classification where the test set has classes, and retrieval where it has captions and is wanted.

    Args:
        data: the test set.
        images: features of its images, [n, d].
        texts: its words.
        examples: queries each way whose first findings are kept.
        group: ranks that have the same features and share the scoring; None for this process alone.
    """
    metrics: dict[str, float] = {}
    result, found = None, dict[str, list[Found]]()
    if data.labels is not None and texts.classes is not None:
        if data.labels.ndim == 1:
            result = zero_shot(images, texts.classes, data.labels, data.class_names, group)
        measured = result.metrics if result else mean_average_precision(images, texts.classes, data.labels, group)
        metrics |= under("zero_shot", measured)
    if texts.captions is not None and texts.features is not None:
        metrics |= under("retrieval", retrieval(images, texts.features, texts.captions, group))
        found = first_found(images, texts.features, texts.captions, examples)
    return ClipResult(metrics, result, texts.captions, found=found)


def under(prefix: str, metrics: Mapping[str, T]) -> dict[str, T]:
    """Metrics with a prefix and a slash before each name."""
    return {f"{prefix}/{metric}": value for metric, value in metrics.items()}


def of_sets(measured: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Metrics of test sets, or of teachers, under their names (`openmoji/zero_shot/top1`); no name adds none."""
    parts = [under(name, metrics) if name else metrics for name, metrics in measured.items()]
    return {metric: value for part in parts for metric, value in part.items()}


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


def _templates(config: EvalConfig, data: EvalSet) -> Sequence[Template]:
    if config.templates != "own":
        return templates_of(config.templates)
    if not data.prompts:
        raise DataError(
            f"eval.templates=own, but a test set ({data.class_names[0]}, ...) has no prompts: write {PROMPTS} beside "
            f"its {CLASS_NAMES}, a prompt with {{c}} a line"
        )
    return [partial(prompt.replace, "{c}") for prompt in data.prompts]
