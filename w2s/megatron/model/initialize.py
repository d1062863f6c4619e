"""Weights drawn from a counter (seed and name), so that every parallel layout starts alike."""

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from w2s.megatron.model.tower import Tower


@dataclass(frozen=True)
class Init:
    """How a tensor starts: `normal` with a standard deviation, `truncated` (normal, cut at one standard deviation),
    `uniform` within a bound, or a `constant`."""

    kind: Literal["normal", "truncated", "uniform", "constant"]
    value: float


def global_name(tower: Tower, name: str) -> str:
    """Return `name` with the layer numbered over all pipeline stages: `blocks.7.mlp.linear_fc1.weight`."""
    return re.sub(r"^blocks\.layers\.(\d+)\.", lambda match: f"blocks.{tower.layer_numbers[int(match[1])]}.", name)


def init_parameters(tower: Tower, rule: Callable[[str], Init], seed: int) -> None:
    """Fill every parameter of `tower` as `rule` says of its global name.

    The whole tensor is drawn on the CPU in float32 and this rank's slice of it is kept.
    """
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            full_name = global_name(tower, name)
            parameter.copy_(_slice(_draw(parameter, rule(full_name), f"{seed}/{full_name}"), parameter))


def _draw(parameter: nn.Parameter, init: Init, seed_key: str) -> Tensor:
    shape = list(parameter.shape)
    if _is_partitioned(parameter):
        shape[parameter.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()  # type: ignore[attr-defined]
    if init.kind == "constant":
        return torch.full(shape, init.value)
    if init.kind == "normal":
        return torch.randn(shape, generator=generator(seed_key)) * init.value
    if init.kind == "truncated":
        return nn.init.trunc_normal_(torch.empty(shape), a=-1, b=1, generator=generator(seed_key)) * init.value
    return (torch.rand(shape, generator=generator(seed_key)) * 2 - 1) * init.value


def generator(seed_key: str) -> torch.Generator:
    """Return a source of random numbers that depend on `seed_key`, such as seed and name of a tensor, alone."""
    digest = hashlib.sha256(seed_key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _slice(full: Tensor, parameter: nn.Parameter) -> Tensor:
    if not _is_partitioned(parameter):
        return full
    parts = full.chunk(parallel_state.get_tensor_model_parallel_world_size(), parameter.partition_dim)  # type: ignore[attr-defined]
    return parts[parallel_state.get_tensor_model_parallel_rank()]


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def load_slices(towers: Mapping[str, Sequence[Tower]], read: Callable[[str], Tensor], names: Collection[str]) -> None:
    """Copy tensors into this rank's slices of the towers' parameters; no others are asked for.

    Args:
        towers: this rank's chunks of each tower, by its name.
        read: returns a whole tensor by its name in our checkpoints, `TOWER.blocks.layers.7.mlp.linear_fc1.weight`. Its
            first axis may be folded ([heads, 3, ...]), so that a view of a mapped file does for what is split there.
        names: what to copy.
    """
    with torch.no_grad():
        for tower, chunks in towers.items():
            named_parameters = ((chunk, *named) for chunk in chunks for named in chunk.named_parameters())
            for chunk, local, parameter in named_parameters:
                name = f"{tower}.{global_name(chunk, local)}".replace(".blocks.", ".blocks.layers.", 1)
                if name in names:
                    parameter.copy_(_slice(read(name), parameter).reshape(parameter.shape))
