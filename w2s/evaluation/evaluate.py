"""The two evaluations that stages ask for: of a CLIP, and of a vision tower's features."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from w2s.config.sections import EvalConfig
from w2s.errors import DataError
from w2s.evaluation.dataset import EvalSet
from w2s.evaluation.encode import Encoder, Tokenizer, encode_all
from w2s.evaluation.knn import knn
from w2s.evaluation.retrieval import retrieval, split_captions
from w2s.evaluation.zero_shot import ZeroShotResult, class_embeddings, zero_shot


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
        encode_image: uint8 images [b, 3, S, S] to features [b, d].
        encode_text: tokens [b, context] to features [b, d].
        tokenize: texts to tokens.
        group: ranks that share the work; None for this process alone.
    """
    images = encode_all(encode_image, data.images, config.batch_size, group)
    metrics: dict[str, float] = {}
    result = None
    if data.labels is not None:
        vectors = class_embeddings(
            data.class_names,
            templates=config.templates,
            encode_text=encode_text,
            tokenize=tokenize,
            batch_size=config.batch_size,
            group=group,
        )
        result = zero_shot(images, vectors, data.labels, data.class_names)
        metrics |= {f"zero_shot/{name}": value for name, value in result.metrics.items()}
    if config.retrieval and data.captions:
        texts, text_numbers, image_numbers = split_captions(data.captions)
        features = encode_all(encode_text, tokenize(texts), config.batch_size, group)
        recalls = retrieval(images, features, image_numbers, text_numbers)
        metrics |= {f"retrieval/{name}": value for name, value in recalls.items()}
    return ClipResult(metrics, result)


def evaluate_knn(
    config: EvalConfig, data: EvalSet, neighbours: EvalSet, *, encode: Encoder, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """k-NN classification of the test set by labelled neighbours; classes are matched by their names.

    Test images of classes that no neighbour has are left out; `knn/coverage` is the fraction that remains.

    Args:
        config: number of neighbours and batch size.
        data: the test set, the same on every rank.
        neighbours: the labelled set that neighbours are taken from, the same on every rank.
        encode: uint8 images [b, 3, S, S] to features [b, d].
        group: ranks that share the work; None for this process alone.

    Returns:
        `knn/top1`, `knn/top5`, `knn/chance_top1` and `knn/coverage`, fractions of 1.

    Raises:
        DataError: a set has no classes, or they have no class in common.
    """
    labels, neighbour_labels = _labels(data, "eval.shards"), _labels(neighbours, "eval.knn_shards")
    numbers = {neighbours.class_names[number]: number for number in neighbour_labels.unique().tolist()}
    matched = labels.new_tensor([numbers.get(data.class_names[number], -1) for number in labels.tolist()])
    kept = matched >= 0
    if not kept.any():
        raise DataError("eval.shards and eval.knn_shards have no class in common: give sets with the same class names")
    features = encode_all(encode, data.images[kept], config.batch_size, group)
    gallery = encode_all(encode, neighbours.images, config.batch_size, group)
    metrics = knn(features, matched[kept], gallery, neighbour_labels, k=config.knn_k)
    metrics["coverage"] = kept.double().mean().item()
    return {f"knn/{name}": value for name, value in metrics.items()}


def _labels(data: EvalSet, option: str) -> Tensor:
    if data.labels is None:
        raise DataError(f"{option} has several captions an image and no classes: k-NN needs class numbers")
    return data.labels
