"""The linear probe against scikit-learn's logistic regression."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from w2s.evaluation.scores import linear_probe as module
from w2s.evaluation.scores.linear_probe import train_probe

CLASSES, WIDTH = 12, 32


def draw(count, seed):
    """Features around class means, far from the origin as those of networks are."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return 0.5 * means[labels] + torch.randn(count, WIDTH, generator=generator) + 2, labels


@pytest.fixture(scope="module")
def probe():
    return train_probe(*draw(800, seed=1))


def test_accuracy_is_scikit_learns(probe):
    features, labels = draw(800, seed=1)
    tested, truth = draw(2000, seed=2)
    theirs = LogisticRegression(C=probe.inverse_strength, tol=1e-8, max_iter=1000)
    theirs.fit(F.normalize(features, dim=-1).numpy(), labels.numpy())
    predictions = torch.from_numpy(theirs.predict(F.normalize(tested, dim=-1).numpy()))
    ours = probe.metrics(tested, truth)
    accuracy = (predictions == truth).double()
    # Both stop a little before the minimum; 0.2 points are 4 of these images.
    assert ours["top1"] == pytest.approx(accuracy.mean().item(), abs=0.002)
    assert 0.5 < ours["top1"] < 0.95 < ours["top5"]
    of_class = [accuracy[truth == label].mean().item() for label in range(CLASSES)]
    assert ours["mean_per_class"] == pytest.approx(sum(of_class) / CLASSES, abs=0.005)
    assert (probe.scores(tested).argmax(1) != predictions).sum() <= 4


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_regularisation_is_one_that_is_best_on_a_held_out_tenth(probe):
    features, labels = draw(800, seed=1)
    units, held_out = F.normalize(features, dim=-1).numpy(), module._held_out(labels).numpy()
    assert held_out.sum() == 80

    def rights(strength):
        theirs = LogisticRegression(C=strength, tol=1e-6, max_iter=1000)
        theirs.fit(units[~held_out], labels[~held_out].numpy())
        return (theirs.predict(units[held_out]) == labels[held_out].numpy()).sum()

    counts = {strength: rights(strength) for strength in module.COARSE}
    assert rights(probe.inverse_strength) >= max(counts.values())
    assert min(counts.values()) < max(counts.values()) - 10


def test_ranks_share_the_choice_and_find_the_same(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 50)
    features, labels = draw(200, seed=1)
    meeting, parts, tried = Barrier(2), [{}, {}], [[], []]

    def on_rank(rank):
        def gather(local):
            parts[rank] = local
            tried[rank] += local
            meeting.wait()
            both = list(parts)
            meeting.wait()
            return both

        return train_probe(features, labels, rank=rank, size=2, gather=gather)

    with ThreadPoolExecutor(2) as pool:
        probes = list(pool.map(on_rank, range(2)))
    alone = train_probe(features, labels)
    assert [probe.inverse_strength for probe in probes] == [alone.inverse_strength] * 2
    assert all(torch.allclose(probe.weight, alone.weight, atol=1e-5) for probe in probes)
    assert len(tried[0]) + len(tried[1]) == len(module.COARSE) + len(module.FINE)
    assert not set(tried[0]) & set(tried[1])
