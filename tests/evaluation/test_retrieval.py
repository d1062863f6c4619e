"""Retrieval against sorting, with several and with equal captions."""

import pytest
import torch
import torch.nn.functional as F

from w2s.evaluation import retrieval as module
from w2s.evaluation.retrieval import retrieval, split_captions


def by_sorting(queries, gallery, right, k):
    """Fraction of queries with a right item among the k nearest."""
    order = (F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T).argsort(1, descending=True)[:, :k]
    return sum(any(right(i, j) for j in row) for i, row in enumerate(order.tolist())) / len(queries)


def test_split_captions():
    texts, text_numbers, image_numbers = split_captions(["a dog\na cat", "a cat", " a hen \n\n"])
    assert texts == ["a dog", "a cat", "a cat", "a hen"]
    assert text_numbers.tolist() == [[0], [1], [1], [2]]
    assert image_numbers.tolist() == [[0, 1], [1, -1], [2, -1]]


@pytest.mark.parametrize("block", [7, 1000])
def test_against_sorting(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    pool = [f"caption {number}" for number in range(25)]
    picks = torch.randint(0, len(pool), (40, 3), generator=generator)
    counts = torch.randint(1, 4, (40,), generator=generator)
    captions = ["\n".join(pool[p] for p in row[:count]) for row, count in zip(picks.tolist(), counts, strict=True)]
    texts, text_numbers, image_numbers = split_captions(captions)
    images = torch.randn(40, 8, generator=generator)
    features = torch.randn(len(texts), 8, generator=generator)
    result = retrieval(images, features, image_numbers, text_numbers)
    for k in (1, 5, 10):
        forward = by_sorting(images, features, lambda i, j: texts[j] in captions[i].splitlines(), k)
        backward = by_sorting(features, images, lambda i, j: texts[i] in captions[j].splitlines(), k)
        assert result[f"image_to_text_recall_at_{k}"] == pytest.approx(forward)
        assert result[f"text_to_image_recall_at_{k}"] == pytest.approx(backward)
        assert result[f"mean_recall_at_{k}"] == pytest.approx((forward + backward) / 2)
    assert 0 < result["image_to_text_recall_at_1"] < result["image_to_text_recall_at_10"]


def test_equal_captions_are_all_right():
    _, text_numbers, image_numbers = split_captions(["red", "red", "blue"])
    images = torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [0.0, 0.0, 1.0]])
    features = torch.tensor([[1.0, 0.0, 0.1], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]])  # each red is nearer to the other
    result = retrieval(images, features, image_numbers, text_numbers)
    assert set(result.values()) == {1.0}


def test_a_wrong_first_answer_counts_at_5_only():
    _, text_numbers, image_numbers = split_captions(["a", "b"])
    result = retrieval(torch.eye(2), torch.eye(2).flip(0), image_numbers, text_numbers)
    assert result["image_to_text_recall_at_1"] == result["text_to_image_recall_at_1"] == 0
    assert result["image_to_text_recall_at_5"] == result["text_to_image_recall_at_10"] == 1
