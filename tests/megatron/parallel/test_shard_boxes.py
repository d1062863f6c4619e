"""Runs of a flattened tensor as boxes."""

from itertools import combinations

import pytest
import torch

from w2s.megatron.parallel.shard_boxes import boxes


@pytest.mark.parametrize("shape", [(), (7,), (1,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_hold_the_numbers_of_a_run_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for begin, end in combinations(range(whole.numel() + 1), 2):
        found = list(boxes(shape, begin, end))
        assert len(found) <= max(2 * len(shape) - 1, 1)
        parts = [whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] for box in found]
        assert torch.cat([part.flatten() for part in parts]).tolist() == list(range(begin, end))
        assert [box.begin for box in found] == [int(part.flatten()[0]) for part in parts]


def test_an_empty_run_has_no_boxes() -> None:
    assert list(boxes((3, 4), 5, 5)) == []
