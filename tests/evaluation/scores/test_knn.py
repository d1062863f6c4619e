"""k-NN against a loop over images."""

import math

import pytest
import torch
import torch.nn.functional as F

from w2s.evaluation.scores import knn as module
from w2s.evaluation.scores.knn import knn


def by_loop(features, labels, neighbours, neighbour_labels, k, first):
    """Fraction of images whose class is among the `first` classes with the most votes."""
    hits = 0
    for feature, label in zip(features, labels.tolist(), strict=True):
        cosines = F.cosine_similarity(feature, neighbours, dim=-1).tolist()
        nearest = sorted(range(len(cosines)), key=lambda index: -cosines[index])[:k]
        votes = {}
        for index in nearest:
            voted = neighbour_labels[index].item()
            votes[voted] = votes.get(voted, 0) + math.exp(cosines[index] / 0.07)
        hits += label in sorted(votes, key=lambda voted: -votes[voted])[:first]
    return hits / len(labels)


@pytest.mark.parametrize(("k", "block"), [(1, 1000), (5, 7), (200, 1000)])
def test_against_a_loop(k, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 6, generator=generator)
    labels = torch.randint(0, 8, (30,), generator=generator)
    neighbour_labels = torch.randint(0, 8, (60,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(30, 6, generator=generator)
    neighbours = centres[neighbour_labels] + 1.5 * torch.randn(60, 6, generator=generator)
    arguments = (features, labels, neighbours, neighbour_labels)
    monkeypatch.setattr(module, "GALLERY_BLOCK", block + 1)
    result = knn(*arguments, k=k)
    assert result["top1"] == pytest.approx(by_loop(*arguments, k, 1))
    assert result["top5"] == pytest.approx(by_loop(*arguments, k, 5))
    assert 1 / 8 < result["top1"] < 1
    assert result["chance_top1"] == 1 / 8


def test_near_neighbours_outvote_many():
    neighbours = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 1, 1])
    assert knn(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), neighbours, labels, k=4)["top1"] == 1


def test_a_class_without_votes_is_never_right():
    result = knn(torch.ones(1, 2), torch.tensor([0]), torch.ones(3, 2), torch.tensor([1, 2, 3]), k=3)
    assert result == {"top1": 0, "top5": 0, "chance_top1": 1 / 3}


@pytest.mark.parametrize("block", [3, 40])
def test_equal_neighbours_count_in_order(block, monkeypatch):
    monkeypatch.setattr(module, "GALLERY_BLOCK", block)
    features, neighbours = torch.ones(1, 2), torch.ones(40, 2)
    labels = torch.arange(40)
    for label, expected in [(0, 1), (4, 1), (5, 0)]:
        assert knn(features, torch.tensor([label]), neighbours, labels, k=5)["top5"] == expected
