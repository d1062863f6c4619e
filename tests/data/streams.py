"""The streams of all ranks of a run, read together."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from w2s.config.sections import DataConfig
from w2s.data.samples.batch import Batch, merge_batches
from w2s.data.samples.sample import SampleSpec
from w2s.data.stream.position import merge_positions
from w2s.data.stream.stream import Stream


class Group:
    """As many ranks as wanted, each with its share of every batch."""

    def __init__(
        self, data: DataConfig, spec: SampleSpec, *, batch: int, seed: int, size: int = 1, position: Any = None
    ) -> None:
        settings: dict[str, Any] = {"global_batch": batch, "seed": seed, "size": size, "position": position}
        self.streams = [Stream(data, spec, rank=rank, **settings) for rank in range(size)]

    def read(self, steps: int) -> list[Batch]:
        return [merge_batches([stream.next() for stream in self.streams]) for _ in range(steps)]

    def position(self) -> Any:
        return json.loads(json.dumps(merge_positions([stream.position() for stream in self.streams])))

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


def assert_same(ours: Sequence[Batch], theirs: Sequence[Batch], *, keys: bool = True) -> None:
    """Batches are equal bit by bit, their names too where `keys` says so."""
    for one, other in zip(ours, theirs, strict=True):
        assert not keys or one.keys == other.keys
        assert all(map(torch.equal, one.teacher_images, other.teacher_images))
        tensors = {name: value for name, value in vars(one).items() if isinstance(value, torch.Tensor)}
        assert all(value.equal(getattr(other, name)) for name, value in tensors.items())
