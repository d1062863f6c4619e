"""Stages of tiny models on local ranks, and what they keep in memory."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.stages.layout_steps import STAGES
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.data.stream.stream import Stream
from w2s.megatron.model import layers
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.stages.clip import ContrastiveStage
from w2s.stages.mim import MaskedStage

SMALL = [
    "model=tiny",
    "data=shards",
    "data.lanes=4",
    "data.workers=0",
    "data.shuffle=8",
    "eval.shards=",
    "eval.knn_shards=",
    "train.steps=100",
]
"""Overrides for a tiny model on shards that the caller gives."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    data_rank: int
    data_size: int
    stage: int


def on_ranks(world_size: int, fn: Any, stage: str, cases: dict[str, Sequence[str]]) -> dict[str, list[Any]]:
    """Call `fn(stage, config, ranks)` on every rank for each case (overrides); return what they gave, by case."""
    configs = {name: load(stage, overrides) for name, overrides in cases.items()}
    everyone = run_ranks(_all_cases, world_size, fn, configs)
    return {name: [results[name] for results in everyone] for name in cases}


def _all_cases(fn: Any, configs: dict[str, Config]) -> dict[str, Any]:
    results = {}
    for name, config in configs.items():
        with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
            stage = STAGES[config.stage](config, ranks)
            results[name] = (_place(config, ranks), fn(stage, config, ranks))
    return results


def _place(config: Config, ranks: Ranks) -> Place:
    return Place(ranks.data_rank, ranks.data_size, ranks.model_rank // config.parallel.tensor)


def allocated(stage: MaskedStage | ContrastiveStage, config: Config, ranks: Ranks) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer (moments and master copies) that Megatron holds on this rank."""
    optimizer = stage.optimizer
    optimizer.prepare_to_load()
    if config.parallel.shard == "full":
        process_groups = [
            group for chunk in optimizer.wrapped for group in chunk.param_and_grad_buffer.parameter_groups
        ]
        return (
            size_of([group.model_weight_buffer.data for group in process_groups]),
            size_of([group.main_grad_buffer.data for group in process_groups]),
            3 * size_of([group.main_weight_buffer.data for group in process_groups]),  # two moments beside
        )
    buffers = [buffer for chunk in optimizer.wrapped for buffer in chunk.buffers]
    masters = [part for group in optimizer.sharded.shard_fp32_from_float16_groups for part in group]
    moments = [
        state[name] for state in optimizer.sharded.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    return (
        size_of([buffer.param_data for buffer in buffers]),
        size_of([buffer.grad_data for buffer in buffers]),
        size_of([*masters, *moments]),
    )


def average_kept(stage: MaskedStage | ContrastiveStage, config: Config, ranks: Ranks) -> int:
    """Bytes of the moving average of the weights on this rank."""
    average, slices = stage.optimizer.average, stage.optimizer.sharded.slices().values()
    return 0 if average is None else size_of([average[part] for part in slices])


def most_kept(stage: MaskedStage | ContrastiveStage, config: Config, ranks: Ranks) -> int:
    """Most bytes that autograd keeps at any time of a step on this rank, weights not counted."""
    stream = Stream(
        config.data,
        stage.spec,
        global_batch=config.train.global_batch,
        seed=0,
        rank=ranks.data_reader_rank,
        size=ranks.world_size,
    )
    batch = stream.next()
    weights = {buffer.param_data.untyped_storage().data_ptr() for c in stage.optimizer.wrapped for buffer in c.buffers}
    kept = Kept(weights)
    # The flash kernel, as on a GPU: a CPU has another one for short sequences.
    with (
        mock.patch.object(layers, "_MATH_KERNEL_UP_TO", 0),
        torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda held: held.tensor),
    ):
        stage.step(batch)
    return kept.most


class Kept:
    """Counts the bytes of the storages of saved tensors while they are saved; `ignored` holds places of others."""

    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.now = self.most = 0
        self.users: Counter[int] = Counter()

    def keep(self, tensor: Tensor) -> "Held":
        """What autograd keeps instead of a tensor."""
        held = Held(self, tensor)
        if held.place not in self.ignored:
            self.now += 0 if self.users[held.place] else held.size
            self.users[held.place] += 1
            self.most = max(self.most, self.now)
        return held

    def drop(self, held: "Held") -> None:
        """Autograd needs a tensor no longer."""
        if held.place not in self.ignored:
            self.users[held.place] -= 1
            self.now -= 0 if self.users[held.place] else held.size


class Held:
    """A tensor that autograd keeps."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        storage = tensor.untyped_storage()
        self.place, self.size = storage.data_ptr(), storage.nbytes()

    def __del__(self) -> None:
        self.kept.drop(self)


def size_of(tensors: Sequence[Tensor | None]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
