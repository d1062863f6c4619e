"""A bit that is flipped on one data-parallel rank."""

import pytest
import torch
from torch import Tensor

from tests.megatron.spawn import make_student, run_split
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.replicas import Divergence, repair

NAME, ITS_NAME_IN_THE_PART = "vision.blocks.1.mlp.linear_fc1.weight", "blocks.layers.1.mlp.linear_fc1.weight"


def _flip(weight: Tensor, bit: int) -> None:
    bits = weight.data.view(torch.int32 if weight.element_size() == 4 else torch.int16).view(-1)
    bits[7] ^= 1 << bit


def _one_bit(ranks: Ranks, dtype: torch.dtype, bit: int) -> tuple[list[Divergence], bool, list[Divergence]]:
    """What is found of a flipped bit on rank 1, whether all weights are as before, and what is found then."""
    towers = {"vision": make_student(dtype=dtype)}
    weights = dict(towers["vision"].chunks[0].named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    assert repair(towers, ranks.data_group) == []
    if ranks.rank == 1:
        _flip(weights[ITS_NAME_IN_THE_PART], bit)
    found = repair(towers, ranks.data_group)
    same = all(torch.equal(weight, before[name]) for name, weight in weights.items())
    return found, same, repair(towers, ranks.data_group)


@pytest.mark.parametrize(("dtype", "bit"), [(torch.float32, 0), (torch.bfloat16, 14)])
def test_three_replicas_mend_what_one_has_lost(dtype: torch.dtype, bit: int) -> None:
    assert run_split(_one_bit, 3, dtype, bit) == [([Divergence(NAME, (1,), repaired=True)], True, [])] * 3


def test_two_replicas_know_only_that_they_differ() -> None:
    odd = [Divergence(NAME, (0, 1), repaired=False)]
    assert run_split(_one_bit, 2, torch.float32, 30) == [(odd, True, odd), (odd, False, odd)]
