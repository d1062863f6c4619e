"""Stages of tiny models on local ranks, and what they keep in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.clip import ContrastiveStage
from stages.mim import MaskedStage
from tests.distributed import run_ranks
from tests.stages.layouts import STAGES
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.megatron import groups
from w2s.megatron.groups import Ranks

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
        with groups.split(config.parallel, torch.device("cpu")) as ranks:
            stage = STAGES[config.stage](config, ranks)
            results[name] = (_place(config, ranks), fn(stage, config, ranks))
    return results


def _place(config: Config, ranks: Ranks) -> Place:
    return Place(ranks.data_rank, ranks.data_size, ranks.model_rank // config.parallel.tensor)


def allocated(stage: MaskedStage | ContrastiveStage, config: Config, ranks: Ranks) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer (moments and master copies) that Megatron holds on this rank."""
    optimizer = stage.optimizer
    optimizer.prepare_to_load()
    buffers = [buffer for chunk in optimizer.chunks for buffer in chunk.buffers]
    masters = [part for group in optimizer.sharded.shard_fp32_from_float16_groups for part in group]
    moments = [
        state[name] for state in optimizer.sharded.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    return (
        size_of([buffer.param_data for buffer in buffers]),
        size_of([buffer.grad_data for buffer in buffers]),
        size_of([*masters, *moments]),
    )


def size_of(tensors: Sequence[Tensor | None]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
