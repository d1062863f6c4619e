"""Ranks that share the scoring find what one finds, each having scored a part."""

from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.distributed import run_ranks
from w2s.evaluation.scores import average_precision, knn, linear_probe, retrieval, zero_shot

BLOCK = 16


def scores(group):
    """Every metric of 70 images, and how many were scored here."""
    generator = torch.Generator().manual_seed(0)
    images, classes = torch.randn(70, 8, generator=generator), torch.randn(5, 8, generator=generator)
    labels = torch.randint(5, (70,), generator=generator)
    several = torch.rand(70, 5, generator=generator) < 0.3
    texts, unit = images + torch.randn(70, 8, generator=generator), F.normalize(classes, dim=-1)
    probe = linear_probe.LinearProbe(classes, torch.zeros(5), torch.zeros(8), 1.0)
    captions = retrieval.split_captions([f"caption {n}" for n in range(70)])
    counts = []

    def counted(module, scorer):
        def count(block, *arguments):
            counts.append(len(block))
            return scorer(block, *arguments)

        return mock.patch.object(module, "rank_of_right", count)

    found, scored = [], {}
    for module, measure in {
        zero_shot: lambda: vars(zero_shot.zero_shot(images, unit, labels, list("abcde"), group)),
        knn: lambda: knn.knn(images, labels, images[::2] + 0.1, labels[::2], k=3, group=group),
        retrieval: lambda: retrieval.retrieval(images, texts, captions, group),
        linear_probe: lambda: probe.metrics(images, labels, group),
        average_precision: lambda: average_precision.mean_average_precision(images, unit, several, group),
    }.items():
        counts.clear()
        if module is average_precision:
            found.append(measure())
            continue
        with mock.patch.object(module, "BLOCK", BLOCK), counted(module, module.rank_of_right):
            found.append(measure())
        scored[module.__name__] = sum(counts)
    found[0]["predictions"] = found[0]["predictions"].tolist()
    return found, scored


def on_ranks():
    return scores(dist.group.WORLD)


def test_two_ranks_find_what_one_finds():
    alone, all_scored = scores(None)
    results = run_ranks(on_ranks, 2)
    for found, scored in results:
        assert found == alone
        # Five blocks of at most 16 images: three for one rank, two and one again for the other.
        assert all(scored[name] <= all_scored[name] * 48 / 70 for name in scored)
    assert set(all_scored.values()) == {70, 140}, "both ways of retrieval"
