"""A checkpoint in another type of numbers."""

from typing import Literal, get_args

import torch
from torch import Tensor

from w2s.checkpoint.weights.released import Released
from w2s.checkpoint.weights.views import Source, renamed
from w2s.errors import ConfigError

Precision = Literal["fp32", "fp16", "bf16"]
TYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cast(source: Released, precision: str) -> Released:
    """Return a checkpoint in the type that `--precision` names, but for the loss's scalars: half of ln 100 is not it.

    Raises:
        ConfigError: there is no such type.
    """
    if precision not in TYPES:
        raise ConfigError(f"--precision {precision} does not exist: use {', '.join(get_args(Precision))}")

    def in_type(tensor: Tensor) -> Tensor:
        return tensor.to(TYPES[precision])

    scalars = ("logit_scale", "logit_bias")
    return source.made_into(
        {name: renamed(name) if name in scalars else Source((name,), in_type) for name in source.meta}
    )
