"""Images classified and retrieved by texts, as a CLIP embeds both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch.distributed as dist
from torch import Tensor

from w2s.config.sections import EvalConfig, Resize
from w2s.errors import DataError
from w2s.evaluation.batched_features import Encoder, TensorItems, Tokenizer, encode_all
from w2s.evaluation.dataset import CLASS_NAMES, PROMPTS, EvalSet
from w2s.evaluation.metric_names import under
from w2s.evaluation.scores.average_precision import mean_average_precision
from w2s.evaluation.scores.retrieval import Captions, Found, first_found, retrieval, split_captions
from w2s.evaluation.scores.zero_shot import Template, ZeroShotResult, class_embeddings, templates_of, zero_shot


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


def _templates(config: EvalConfig, data: EvalSet) -> Sequence[Template]:
    if config.templates != "own":
        return templates_of(config.templates)
    if not data.prompts:
        raise DataError(
            f"eval.templates=own, but a test set ({data.class_names[0]}, ...) has no prompts: write {PROMPTS} beside "
            f"its {CLASS_NAMES}, a prompt with {{c}} a line"
        )
    return [partial(prompt.replace, "{c}") for prompt in data.prompts]
