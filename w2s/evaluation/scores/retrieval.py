"""Image-text retrieval: how often a right answer is among the first k, both ways."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from w2s.evaluation.batched_features import score_all
from w2s.evaluation.scores.ranking import rank_of_right

BLOCK = 256
"""Queries whose scores are in memory at a time."""
RECALL_AT = (1, 5, 10)
SHOWN = 5
"""Findings that are kept of a query."""


@dataclass(frozen=True)
class Captions:
    """The captions of a test set, and which are right answers to which image: those that have an id in common."""

    texts: list[str]
    """The m captions, in order."""
    text_ids: Tensor
    """int64 [m, 1]."""
    image_ids: Tensor
    """int64 [n, most captions of an image], filled up with -1."""


@dataclass(frozen=True)
class Found:
    """What a query finds first."""

    query: int
    """Number of the image or the caption."""
    hits: list[int]
    """Numbers of the captions or the images, the nearest first."""
    right: list[bool]
    """Whether each of them is a right answer."""


def split_captions(captions: list[str], *, equal_is_right: bool = True) -> Captions:
    """Take the texts of a test set apart.

    Args:
        captions: a text an image, its captions on lines of their own.
        equal_is_right: give equal captions one id, so that an image that has a caption is a right answer to every
            equal one; otherwise a caption is a right answer to its own image alone, as CLIP_benchmark counts.
    """
    lines = [[line.strip() for line in text.splitlines() if line.strip()] or [""] for text in captions]
    texts = [line for image in lines for line in image]
    by_text = {text: text_id for text_id, text in enumerate(dict.fromkeys(texts))}
    ids = [by_text[text] for text in texts] if equal_is_right else list(range(len(texts)))
    most, of_caption = max(len(image) for image in lines), iter(ids)
    owners = [[next(of_caption) for _ in image] + [-1] * (most - len(image)) for image in lines]
    return Captions(texts, torch.tensor(ids)[:, None], torch.tensor(owners))


def retrieval(
    image_features: Tensor, text_features: Tensor, captions: Captions, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Recall at 1, 5 and 10 from image to text and from text to image, by cosine.

    Args:
        image_features: [n, d], not normalised.
        text_features: [m, d], not normalised.
        captions: of which these are the features.
        group: ranks that share the work; None for this process alone.

    Returns:
        `image_to_text_recall_at_K`, `text_to_image_recall_at_K` and `mean_recall_at_K` of both ways, fractions of 1.
    """
    ways = _ways(image_features, text_features, captions)
    ranks = {way: _ranks(*sides, group) for way, sides in ways.items()}
    recalls = {way: [(rank < k).double().mean().item() for k in RECALL_AT] for way, rank in ranks.items()}
    recalls["mean"] = [sum(both) / len(recalls) for both in zip(*recalls.values(), strict=True)]
    return {
        f"{way}_recall_at_{k}": value
        for way, values in recalls.items()
        for k, value in zip(RECALL_AT, values, strict=True)
    }


def first_found(
    image_features: Tensor, text_features: Tensor, captions: Captions, count: int
) -> dict[str, list[Found]]:
    """What some queries find first, of `count` queries each way, evenly chosen; as `retrieval`."""
    ways = _ways(image_features, text_features, captions) if count else {}
    return {way: _first(*sides, count) for way, sides in ways.items()}


def _ways(
    image_features: Tensor, text_features: Tensor, captions: Captions
) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Queries, gallery and their ids, from images to texts and back."""
    images, texts = F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)
    of_images, of_texts = captions.image_ids.to(images.device), captions.text_ids.to(images.device)
    return {
        "image_to_text": (images, texts, of_images, of_texts),
        "text_to_image": (texts, images, of_texts, of_images),
    }


def _first(queries: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, count: int) -> list[Found]:
    chosen = torch.linspace(0, len(queries) - 1, count, device=queries.device).long().unique()
    hits = (queries[chosen] @ gallery.T).sort(dim=1, descending=True, stable=True).indices[:, :SHOWN]
    right = _share(query_ids[chosen], gallery_ids).gather(1, hits)
    return [Found(*each) for each in zip(chosen.tolist(), hits.tolist(), right.tolist(), strict=True)]


def _ranks(
    queries: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """For every query the number of wrong gallery items before its best right one, [n, 1]."""

    def score(indices: Tensor) -> Tensor:
        return rank_of_right(queries[indices] @ gallery.T, _share(query_ids[indices], gallery_ids))[:, None]

    return score_all(score, queries, BLOCK, group)


def _share(first: Tensor, second: Tensor) -> Tensor:
    """Bool [n, m]: row i of `first` [n, a] and row j of `second` [m, b] have an id in common."""
    shared = torch.zeros(len(first), len(second), dtype=torch.bool, device=first.device)
    for left in first.T:
        for right in second.T:
            shared |= (left[:, None] == right) & (left[:, None] >= 0)
    return shared
