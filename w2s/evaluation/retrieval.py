"""Image-text retrieval: how often a right answer is among the first k, both ways."""

import torch
import torch.nn.functional as F
from torch import Tensor

from w2s.evaluation.ranking import rank_of_right

BLOCK = 256
"""Queries whose scores are in memory at a time."""
RECALL_AT = (1, 5, 10)


def split_captions(captions: list[str]) -> tuple[list[str], Tensor, Tensor]:
    """All captions of a test set, and which of them belong to which image.

    Equal captions get one number: an image that has a caption is a right answer to every equal one.

    Args:
        captions: a text an image, its captions on lines of their own.

    Returns:
        The m captions in order; their numbers, int64 [m, 1]; the numbers of each image's captions, int64 [n, most
        captions of an image], filled up with -1.
    """
    lines = [[line.strip() for line in text.splitlines() if line.strip()] or [""] for text in captions]
    texts = [line for image in lines for line in image]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    most = max(len(image) for image in lines)
    owners = [[numbers[line] for line in image] + [-1] * (most - len(image)) for image in lines]
    return texts, torch.tensor([[numbers[text]] for text in texts]), torch.tensor(owners)


def retrieval(
    image_features: Tensor, text_features: Tensor, image_numbers: Tensor, text_numbers: Tensor
) -> dict[str, float]:
    """Recall at 1, 5 and 10 from image to text and from text to image, by cosine.

    Args:
        image_features: [n, d], not normalised.
        text_features: [m, d], not normalised.
        image_numbers: caption numbers of the images, int64 [n, a] (see `split_captions`).
        text_numbers: caption numbers of the texts, int64 [m, 1].

    Returns:
        `image_to_text_recall_at_K`, `text_to_image_recall_at_K` and `mean_recall_at_K` of both ways, fractions of 1.
    """
    images, texts = F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)
    image_numbers, text_numbers = image_numbers.to(images.device), text_numbers.to(images.device)
    ranks = {
        "image_to_text": _ranks(images, texts, image_numbers, text_numbers),
        "text_to_image": _ranks(texts, images, text_numbers, image_numbers),
    }
    found = {way: [(rank < k).double().mean().item() for k in RECALL_AT] for way, rank in ranks.items()}
    found["mean"] = [sum(both) / len(found) for both in zip(*found.values(), strict=True)]
    return {
        f"{way}_recall_at_{k}": value
        for way, values in found.items()
        for k, value in zip(RECALL_AT, values, strict=True)
    }


def _ranks(queries: Tensor, gallery: Tensor, query_numbers: Tensor, gallery_numbers: Tensor) -> Tensor:
    """For every query the number of wrong gallery items before its best right one."""
    blocks = zip(queries.split(BLOCK), query_numbers.split(BLOCK), strict=True)
    return torch.cat([rank_of_right(block @ gallery.T, _share(own, gallery_numbers)) for block, own in blocks])


def _share(first: Tensor, second: Tensor) -> Tensor:
    """Bool [n, m]: row i of `first` [n, a] and row j of `second` [m, b] have a number in common."""
    shared = torch.zeros(len(first), len(second), dtype=torch.bool, device=first.device)
    for left in first.T:
        for right in second.T:
            shared |= (left[:, None] == right) & (left[:, None] >= 0)
    return shared
