"""Target normalisation with running statistics, and the constant baseline."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from w2s.teachers.distillation.targets import TargetNorm


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    offset = torch.tensor([0.0, 100.0, -3.0, 5.0])
    return [torch.randn(6, 4, 4, generator=generator) * (step + 1) + offset for step in range(count)]


def sharded(updates):
    """Feed this rank's half of the images of every batch."""
    norm = TargetNorm(4, "standardize")
    rank, size = dist.get_rank(), dist.get_world_size()
    outputs = [norm(batch.chunk(size)[rank], dist.group.WORLD, update=True) for batch in updates]
    return norm.state_dict(), outputs


def test_none_returns_the_targets():
    norm = TargetNorm(4, "none")
    targets = batches(1)[0]
    assert norm(targets, update=True) is targets
    assert norm.state_dict() == {}


def test_layernorm_is_over_the_channels_of_each_vector():
    norm = TargetNorm(4, "layernorm", eps=0.0)
    targets = batches(1)[0]
    rows = targets.double()
    expected = (rows - rows.mean(-1, keepdim=True)) / rows.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(norm(targets, update=True).double(), expected, atol=1e-5, rtol=1e-5)
    assert norm.ready and norm.state_dict() == {}


def test_statistics_are_those_of_all_batches_so_far():
    norm = TargetNorm(4, "standardize", eps=0.0)
    seen = []
    for batch in batches():
        seen.append(batch)
        rows = torch.cat(seen).flatten(0, 1).double()
        expected = (batch.double() - rows.mean(0)) / rows.std(0, correction=0)
        torch.testing.assert_close(norm(batch, update=True).double(), expected, atol=1e-5, rtol=1e-5)
    assert norm.count == 72
    torch.testing.assert_close(norm.mean, rows.mean(0), atol=1e-6, rtol=1e-7)
    torch.testing.assert_close(norm.deviations / norm.count, rows.var(0, correction=0), atol=0, rtol=1e-5)


def test_without_update_nothing_moves():
    norm = TargetNorm(4, "standardize")
    first, second, _ = batches()
    with pytest.raises(ValueError, match="update=True"):
        norm(first, update=False)
    norm(first, update=True)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(second, update=False)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_a_dead_channel_stays_finite():
    norm = TargetNorm(4, "standardize")
    assert torch.equal(norm(torch.ones(2, 4, 4), update=True), torch.zeros(2, 4, 4))


@pytest.mark.parametrize("seen", [0, 2])
def test_a_batch_without_a_sample_changes_nothing(seen):
    """Also before there was one: a teacher may have no sample in a step."""
    norm = TargetNorm(4, "standardize")
    for batch in batches()[:seen]:
        norm(batch, update=True)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert norm(torch.empty(0, 16, 4), update=True).shape == (0, 16, 4)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert norm.ready == bool(seen)


def test_resume_is_bit_exact():
    norm, resumed = TargetNorm(4, "standardize"), TargetNorm(4, "standardize")
    first, *rest = batches(4)
    norm(first, update=True)
    resumed.load_state_dict({name: value.clone() for name, value in norm.state_dict().items()})
    for batch in rest:
        assert torch.equal(norm(batch, update=True), resumed(batch, update=True))


def test_two_ranks_equal_one():
    alone = TargetNorm(4, "standardize")
    updates = batches()
    expected = [alone(batch, update=True) for batch in updates]
    results = run_ranks(sharded, 2, updates)
    for state, _ in results:
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, atol=1e-9, rtol=1e-9)  # float64 sums in another order
    for step, whole in enumerate(expected):
        halves = torch.cat([outputs[step] for _, outputs in results])
        torch.testing.assert_close(halves, whole, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(results[0][0][name], value) for name, value in results[1][0].items())
