"""Mean average precision against scikit-learn's."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from w2s.evaluation.scores.average_precision import mean_average_precision


def test_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(6, 8, generator=generator), dim=-1)
    labels = torch.rand(200, 6, generator=generator) < 0.2
    labels[:, 5] = False  # a class that no image has does not count
    images = labels.float() @ classes + 0.5 * torch.randn(200, 8, generator=generator)
    scores = F.normalize(images, dim=-1) @ classes.T
    theirs = [average_precision_score(labels[:, label], scores[:, label]) for label in range(5)]
    ours = mean_average_precision(images, classes, labels)
    assert ours["mean_average_precision"] == pytest.approx(sum(theirs) / 5, abs=1e-12)
    assert ours["chance_mean_average_precision"] == pytest.approx(labels[:, :5].double().mean().item())
    assert 0.3 < ours["mean_average_precision"] < 0.95


def test_of_equal_scores_the_earlier_image_is_first():
    labels = torch.tensor([[False], [True], [True]])
    measured = mean_average_precision(torch.ones(3, 2), F.normalize(torch.ones(1, 2), dim=-1), labels)
    assert measured["mean_average_precision"] == pytest.approx((1 / 2 + 2 / 3) / 2)
