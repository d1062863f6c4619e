"""A checkpoint in another type of numbers."""

from typing import Literal, get_args

import torch
from torch import Tensor

from w2s.checkpoint.weights.released import Released
from w2s.errors import ConfigError

Precision = Literal["fp32", "fp16", "bf16"]
TYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def numbers(precision: str) -> torch.dtype:
    """Return the type that `--precision` names.

    Raises:
        ConfigError: there is no such type.
    """
    if precision not in TYPES:
        raise ConfigError(f"--precision {precision} does not exist: use {', '.join(get_args(Precision))}")
    return TYPES[precision]


class Cast(Released):
    """A checkpoint whose tensors are read in one type, but for the scalars of the loss: half of ln 100 is not it."""

    def __init__(self, source: Released, dtype: torch.dtype) -> None:
        """Read `source` in `dtype`."""
        self._source, self._dtype = source, dtype
        self.format, self.path, self.heads = source.format, source.path, source.heads
        self.meta = {name: self._cast(name, tensor) for name, tensor in source.meta.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor in the released layout."""
        return self._cast(name, self._source.read(name))

    def origin(self, name: str) -> str:
        """Return the name that a tensor has in the checkpoint itself."""
        return self._source.origin(name)

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if name in ("logit_scale", "logit_bias") else tensor.to(self._dtype)
