"""What a data-parallel rank holds of a tensor, for a checkpoint: a range of its numbers, as boxes.

The distributed optimizer divides a buffer of flattened parameters into equal ranges, which begin and end anywhere. A
range of a matrix is the end of a row, some whole rows, and the beginning of another: three boxes with an offset each,
which Megatron's format stores and any other layout can read. So every rank writes and reads its own share, and nothing
is gathered.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor


class Box(NamedTuple):
    """A part of a tensor."""

    offset: tuple[int, ...]
    """Of its first number."""
    shape: tuple[int, ...]
    begin: int
    """Of its numbers in the flattened tensor."""


def boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[Box]:
    """Give the boxes of the numbers `begin` to `end` of a flattened tensor, in order; at most 2 n - 1 for n axes."""
    if begin == end:
        return
    if len(shape) == 0:
        yield Box((), (), begin)
        return
    if len(shape) == 1:
        yield Box((begin,), (end - begin,), begin)
        return
    row = prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:
        # Within a single row.
        yield from _in_row(shape, begin // row, begin, end)
        return
    yield from _in_row(shape, first - 1, begin, first * row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * row)
    yield from _in_row(shape, last, last * row, end)


def _in_row(shape: Sequence[int], row: int, begin: int, end: int) -> Iterator[Box]:
    """The boxes of numbers that lie in one row of the first axis."""
    start = row * prod(shape[1:])
    for box in boxes(shape[1:], begin - start, end - start):
        yield Box((row, *box.offset), (1, *box.shape), start + box.begin)


def sharded_boxes(whole: ShardedTensor, key: str, values: Tensor, begin: int) -> list[ShardedTensor]:
    """Describe a range of the numbers of a tensor to Megatron.

    Args:
        whole: what this rank's tensor-parallel group holds of the tensor.
        key: its name in the checkpoint.
        values: the numbers, flat.
        begin: where they begin in the flattened tensor.
    """
    return [
        ShardedTensor(
            key=key,
            data=values.detach()[box.begin - begin : box.begin - begin + prod(box.shape)].view(box.shape),
            dtype=values.dtype,
            local_shape=box.shape,
            global_shape=whole.global_shape,
            global_offset=tuple(map(sum, zip(whole.global_offset, box.offset, strict=True))),
            axis_fragmentations=None,
            # No other data-parallel rank has it; of tensor-parallel ranks with the same, one writes.
            replica_id=(*whole.replica_id[:2], 0),
        )
        for box in boxes(whole.local_shape, begin, begin + values.numel())
    ]


def joined(boxes: Iterable[Tensor]) -> Tensor:
    """Return the numbers of a range, flat, out of its boxes as they were read."""
    return torch.cat([box.flatten() for box in boxes])


def sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    """Give the tensors of what Megatron describes of a state."""
    yield from (part for part in nested_values(state) if isinstance(part, ShardedTensor))


def optimizer_boxes(
    weights: Any, states: Iterable[tuple[Tensor, int, Mapping[str, Tensor]]]
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """Describe a rank's share of an optimizer's state, by index of the weight and name of the tensor.

    Args:
        weights: what Megatron describes of the weights.
        states: of each weight where the rank's range of it begins, and that range of master weight and moments.
    """
    whole = {part.data: part for part in sharded_tensors(weights)}
    return {
        index: {
            name: sharded_boxes(whole[weight], f"optimizer.state.{name}.{whole[weight].key}", values, begin)
            for name, values in tensors.items()
        }
        for index, (weight, begin, tensors) in enumerate(states)
    }
