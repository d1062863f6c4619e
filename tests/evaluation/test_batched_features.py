"""Encoding a set: complete, in order, and the same on any number of ranks."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_ranks
from w2s.evaluation import batched_features as module
from w2s.evaluation.batched_features import TensorItems, encode_all


def encode(batch):
    """Features that depend on the whole batch, as kernels' rounding does."""
    return torch.stack([batch.float(), batch.float() + batch.float().sum() / 7], 1)


def encode_on_ranks(sizes):
    module.AT_A_TIME = 2
    calls = []
    group = dist.group.WORLD
    features = [
        encode_all(lambda batch: calls.append(1) or encode(batch), TensorItems(torch.arange(n)), 4, group)
        for n in sizes
    ]
    return features, len(calls)


def fail_on_one_rank():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 is ill")
    dist.barrier()


def test_one_process_encodes_batch_by_batch():
    sizes = []
    features = encode_all(lambda batch: sizes.append(len(batch)) or encode(batch), TensorItems(torch.arange(10)), 4)
    assert sizes == [4, 4, 2]
    assert torch.equal(features[:, 0], torch.arange(10.0))


def test_no_graph_is_kept():
    weight = torch.ones(1, 2, requires_grad=True)
    assert not encode_all(lambda batch: batch[:, None] * weight, TensorItems(torch.ones(3)), 2).requires_grad


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_work_and_all_get_the_same(ranks):
    sizes = [10, 3, 16]  # an uneven last batch, fewer batches than ranks, whole batches
    results = run_ranks(encode_on_ranks, ranks, sizes)
    assert [calls for _, calls in results] == [{2: 5, 3: 4}[ranks]] * ranks
    for features, _ in results:
        for size, encoded in zip(sizes, features, strict=True):
            assert torch.equal(encoded, encode_all(encode, TensorItems(torch.arange(size)), 4))


def test_a_failing_rank_ends_the_run_with_its_traceback():
    with pytest.raises(RankError, match=r"^rank 1 of 2\n(.*\n)*ValueError: rank 1 is ill"):
        run_ranks(fail_on_one_rank, 2)
