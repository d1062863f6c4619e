"""Weights of the tests' own making in towers."""

from collections.abc import Mapping

from torch import Tensor

from w2s.megatron.model.initialize import global_name, load_slices
from w2s.megatron.model.tower import Tower


def load_tensors(tower: Tower, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, by global name, into this rank's slices of a tower's parameters; every name must be there."""
    own = [global_name(tower, name) for name, _ in tower.named_parameters()]
    names = {f"tower.{name}".replace(".blocks.", ".blocks.layers.", 1): name for name in own}
    load_slices({"tower": [tower]}, lambda name: tensors[names[name]], names)
