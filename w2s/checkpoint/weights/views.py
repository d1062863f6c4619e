"""Tensors of a checkpoint under other names and in other layouts, each made when it is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from w2s.checkpoint.weights.tensor_files import Tensors


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Source:
    """What a tensor is made of."""

    names: tuple[str, ...]
    """Tensors of the checkpoint."""
    make: Callable[..., Tensor] = _same
    """Makes it out of them; they may be on the meta device, and so is what is made then."""


def renamed(name: str) -> Source:
    """Return the tensor `name` as it is."""
    return Source((name,))


def zeros_for(name: str) -> Source:
    """Return the bias of zeros of a linear with the weight `name`."""
    return Source((name,), lambda weight: weight.new_zeros(len(weight)))


class View:
    """Tensors that are made out of others.

    Args:
        tensors: the checkpoint, or another view of it.
        sources: what each tensor is made of, by its name here.

    Attributes:
        meta: every tensor on the meta device by name, for its shape and type.
    """

    def __init__(self, tensors: Tensors, sources: Mapping[str, Source]) -> None:
        self._tensors, self._sources = tensors, sources
        self.meta = {
            name: source.make(*(tensors.meta[each] for each in source.names)) for name, source in sources.items()
        }

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        source = self._sources[name]
        return source.make(*(self._tensors.read(each) for each in source.names))

    def origin(self, name: str) -> str:
        """Return the name that a tensor has in the checkpoint itself; of several it is made of, the first one's."""
        first = self._sources[name].names[0]
        return self._tensors.origin(first) if isinstance(self._tensors, View) else first
