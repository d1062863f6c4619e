"""Ranks of right answers, with ties and values that are not numbers."""

import torch

from w2s.evaluation.scores.ranking import one_hot, rank_of_right


def test_rank_counts_the_wrong_answers_before_the_best_right_one():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    assert rank_of_right(scores, one_hot(torch.tensor([1]), 4)).tolist() == [0]
    assert rank_of_right(scores, one_hot(torch.tensor([0]), 4)).tolist() == [3]
    right = torch.tensor([[True, False, True, False]])
    assert rank_of_right(scores, right).tolist() == [2]


def test_ties_go_to_the_lower_index():
    scores = torch.zeros(4, 4)
    assert rank_of_right(scores, one_hot(torch.arange(4), 4)).tolist() == [0, 1, 2, 3]
    right = torch.tensor([[False, True, False, True]])
    assert rank_of_right(scores[:1], right).tolist() == [1]


def test_a_diverged_model_is_never_right():
    scores = torch.full((3, 8), torch.nan)
    assert rank_of_right(scores, one_hot(torch.arange(3), 8)).tolist() == [7, 7, 7]


def test_against_sorting():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (50, 9), generator=generator).float()
    right = torch.rand(50, 9, generator=generator) < 0.3
    right[:, 4] = True
    ranks = rank_of_right(scores, right).tolist()
    for row, marks, rank in zip(scores.tolist(), right.tolist(), ranks, strict=True):
        order = sorted(range(9), key=lambda place: -row[place])  # Python's sort is stable
        assert rank == next(position for position, place in enumerate(order) if marks[place])
