"""Retrieval against sorting, with several and with equal captions."""

import pytest
import torch
import torch.nn.functional as F

from w2s.evaluation.scores import retrieval as module
from w2s.evaluation.scores.retrieval import first_found, retrieval, split_captions


def by_sorting(queries, gallery, right, k):
    """Fraction of queries with a right item among the k nearest."""
    order = (F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T).argsort(1, descending=True)[:, :k]
    return sum(any(right(i, j) for j in row) for i, row in enumerate(order.tolist())) / len(queries)


def test_split_captions():
    captions = split_captions(["a dog\na cat", "a cat", " a hen \n\n"])
    assert captions.texts == ["a dog", "a cat", "a cat", "a hen"]
    assert captions.text_ids.tolist() == [[0], [1], [1], [2]]
    assert captions.image_ids.tolist() == [[0, 1], [1, -1], [2, -1]]
    strict = split_captions(["a dog\na cat", "a cat", " a hen \n\n"], equal_is_right=False)
    assert strict.text_ids.tolist() == [[0], [1], [2], [3]]
    assert strict.image_ids.tolist() == [[0, 1], [2, -1], [3, -1]]


@pytest.mark.parametrize("block", [7, 1000])
def test_against_sorting(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    pool = [f"caption {index}" for index in range(25)]
    picks = torch.randint(0, len(pool), (40, 3), generator=generator)
    counts = torch.randint(1, 4, (40,), generator=generator)
    captions = ["\n".join(pool[p] for p in row[:count]) for row, count in zip(picks.tolist(), counts, strict=True)]
    split = split_captions(captions)
    texts = split.texts
    images = torch.randn(40, 8, generator=generator)
    features = torch.randn(len(texts), 8, generator=generator)
    result = retrieval(images, features, split)
    for k in (1, 5, 10):
        forward = by_sorting(images, features, lambda i, j: texts[j] in captions[i].splitlines(), k)
        backward = by_sorting(features, images, lambda i, j: texts[i] in captions[j].splitlines(), k)
        assert result[f"image_to_text_recall_at_{k}"] == pytest.approx(forward)
        assert result[f"text_to_image_recall_at_{k}"] == pytest.approx(backward)
        assert result[f"mean_recall_at_{k}"] == pytest.approx((forward + backward) / 2)
    assert 0 < result["image_to_text_recall_at_1"] < result["image_to_text_recall_at_10"]


def test_equal_captions_are_all_right():
    captions = split_captions(["red", "red", "blue"])
    images = torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [0.0, 0.0, 1.0]])
    features = torch.tensor([[1.0, 0.0, 0.1], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]])  # each red is nearer to the other
    assert set(retrieval(images, features, captions).values()) == {1.0}
    strict = split_captions(["red", "red", "blue"], equal_is_right=False)
    assert retrieval(images, features, strict)["image_to_text_recall_at_1"] == pytest.approx(1 / 3)


def test_a_wrong_first_answer_counts_at_5_only():
    result = retrieval(torch.eye(2), torch.eye(2).flip(0), split_captions(["a", "b"]))
    assert result["image_to_text_recall_at_1"] == result["text_to_image_recall_at_1"] == 0
    assert result["image_to_text_recall_at_5"] == result["text_to_image_recall_at_10"] == 1


def test_what_some_queries_find_first():
    captions = split_captions(["zero\nnil", "one", "two", "three", "four", "five"])
    images = torch.eye(6)
    features = torch.eye(6)[[0, 1, 1, 2, 3, 4, 5]] + 0.01 * torch.arange(6)  # "nil" looks like "one"
    found = first_found(images, features, captions, 2)
    assert [one.query for one in found["image_to_text"]] == [0, 5]
    first, last = found["image_to_text"]
    assert first.hits[0] == 0 and first.right == [hit in (0, 1) for hit in first.hits]
    assert last.hits[0] == 6 and last.right == [True, False, False, False, False]
    assert [one.query for one in found["text_to_image"]] == [0, 6]
    assert found["text_to_image"][1].hits[0] == 5 and found["text_to_image"][1].right[0]
    assert first_found(images, features, captions, 0) == {}
