"""Other people's tensors under new names: Q, K and V, which they keep apart, are joined when they are read."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from w2s.checkpoint.weights.tensor_files import Tensors

_QKV = re.compile(r"self_attn\.([qkv])_proj")


class Joined:
    """The tensors of a checkpoint of transformers.

    Args:
        tensors: the checkpoint.
        names: its names, by what `rename` is told.
        rename: gives the new name; those of Q, K and V are the same.
        shape: gives a tensor of a new name its new shape.
    """

    def __init__(
        self,
        tensors: Tensors,
        names: Mapping[str, str],
        rename: Callable[[str], str],
        shape: Callable[[str, Tensor], Tensor],
    ) -> None:
        self._tensors, self._shape = tensors, shape
        self._origins: dict[str, list[str]] = {}
        for name in sorted(names, key=_place):
            self._origins.setdefault(rename(name), []).append(names[name])
        self.meta = {name: self._made(name, [tensors.meta[each] for each in of]) for name, of in self._origins.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor by its new name."""
        return self._made(name, [self._tensors.read(origin) for origin in self._origins[name]])

    def _made(self, name: str, parts: list[Tensor]) -> Tensor:
        return self._shape(name, torch.cat(parts) if len(parts) > 1 else parts[0])


def _place(name: str) -> int:
    """Q before K before V; the order of all others does not matter."""
    match = _QKV.search(name)
    return "qkv".index(match[1]) if match else 0
