"""The two evaluations that stages ask for: of a CLIP, and of a vision tower's features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from w2s.config.sections import EvalConfig
from w2s.errors import DataError
from w2s.evaluation.dataset import CLASS_NAMES, PROMPTS, EvalSet
from w2s.evaluation.encode import Encoder, Tokenizer, encode_all, over_frames
from w2s.evaluation.knn import knn
from w2s.evaluation.retrieval import retrieval, split_captions
from w2s.evaluation.zero_shot import TEMPLATES, Template, ZeroShotResult, class_embeddings, zero_shot


@dataclass(frozen=True)
class ClipResult:
    """Metrics of a CLIP and the details of its zero-shot classification."""

    metrics: dict[str, float]
    """By MLflow name (`zero_shot/top1`, `retrieval/image_to_text_recall_at_1`, ...), fractions of 1."""
    zero_shot: ZeroShotResult | None
    """None where the test set has no classes."""


def evaluate_clip(
    config: EvalConfig,
    data: EvalSet,
    *,
    encode_image: Encoder,
    encode_text: Encoder,
    tokenize: Tokenizer,
    group: dist.ProcessGroup | None = None,
) -> ClipResult:
    """Zero-shot classification where the test set has classes, and retrieval where it has captions and is wanted.

    Args:
        config: prompts, batch size, and whether to measure retrieval.
        data: the test set, the same on every rank.
        encode_image: uint8 images [b, 3, S, S] to features [b, d]; those of a clip are the mean of its frames'.
        encode_text: tokens [b, context] to features [b, d].
        tokenize: texts to tokens.
        group: ranks that share the work; None for this process alone.
    """
    images = encode_all(over_frames(encode_image), data.images, config.batch_size, group)
    metrics: dict[str, float] = {}
    result = None
    if data.labels is not None:
        vectors = class_embeddings(
            data.class_names,
            templates=_templates(config, data),
            encode_text=encode_text,
            tokenize=tokenize,
            batch_size=config.batch_size,
            group=group,
        )
        result = zero_shot(images, vectors, data.labels, data.class_names)
        metrics |= under("zero_shot", result.metrics)
    if config.retrieval and data.captions:
        texts, text_numbers, image_numbers = split_captions(data.captions)
        features = encode_all(encode_text, tokenize(texts), config.batch_size, group)
        recalls = retrieval(images, features, image_numbers, text_numbers)
        metrics |= under("retrieval", recalls)
    return ClipResult(metrics, result)


def under(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics with a prefix and a slash before each name."""
    return {f"{prefix}/{metric}": value for metric, value in metrics.items()}


def of_sets(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The metrics of test sets under the sets' names (`openmoji/zero_shot/top1`); a set without a name adds none."""
    parts = [under(name, metrics) if name else metrics for name, metrics in measured.items()]
    return {metric: value for part in parts for metric, value in part.items()}


def evaluate_knn(
    config: EvalConfig,
    tests: Mapping[str, EvalSet],
    neighbours: EvalSet,
    *,
    encode: Encoder,
    group: dist.ProcessGroup | None = None,
) -> dict[str, dict[str, float]]:
    """k-NN classification of test sets by labelled neighbours; classes are matched by their names.

    Test images of classes that no neighbour has are left out; `coverage` is the fraction that remains. A set of which
    nothing remains has a coverage of 0 and no other metric.

    Args:
        config: number of neighbours and batch size.
        tests: test sets by name, the same on every rank.
        neighbours: the labelled set that neighbours are taken from, the same on every rank.
        encode: uint8 images [b, 3, S, S] to features [b, d]; those of a clip are the mean of its frames'.
        group: ranks that share the work; None for this process alone.

    Returns:
        for every test set `top1`, `top5`, `chance_top1` and `coverage`, fractions of 1.

    Raises:
        DataError: the neighbours have no classes, or none in common with any test set.
    """
    if neighbours.labels is None:
        raise DataError("eval.knn_shards has several captions an image and no classes: k-NN needs class numbers")
    matched = {name: _matched(data, neighbours) for name, data in tests.items()}
    if all((labels < 0).all() for labels in matched.values()):
        raise DataError("the test images and eval.knn_shards have no class in common: give the same class names")
    encode = over_frames(encode)
    gallery = encode_all(encode, neighbours.images, config.batch_size, group)
    measured = {}
    for name, labels in matched.items():
        kept = labels >= 0
        measured[name] = {"coverage": kept.double().mean().item()}
        if kept.any():
            features = encode_all(encode, tests[name].images[kept], config.batch_size, group)
            measured[name] |= knn(features, labels[kept], gallery, neighbours.labels, k=config.knn_k)
    return measured


def _matched(data: EvalSet, neighbours: EvalSet) -> Tensor:
    """The class number that each test image has among the neighbours, int64 [n]; -1 where they lack its class."""
    if data.labels is None or neighbours.labels is None:
        return torch.full((len(data.images),), -1)
    numbers = {neighbours.class_names[number]: number for number in neighbours.labels.unique().tolist()}
    return torch.tensor([numbers.get(data.class_names[number], -1) for number in data.labels.tolist()])


def _templates(config: EvalConfig, data: EvalSet) -> Sequence[Template]:
    if config.templates != "own":
        return TEMPLATES[config.templates]
    if not data.prompts:
        raise DataError(
            f"eval.templates=own, but a test set ({data.class_names[0]}, ...) has no prompts: write {PROMPTS} beside "
            f"its {CLASS_NAMES}, a prompt with {{c}} a line"
        )
    return [partial(prompt.replace, "{c}") for prompt in data.prompts]
