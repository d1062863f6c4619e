"""The tensors of towers as the released EVA code names them, and towers that are given theirs."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace

from torch import Tensor

from w2s.checkpoint.eva_format import by_head, eva_name, is_fused, separate
from w2s.megatron.initialize import copy_slices, global_name
from w2s.megatron.tower import Tower


def from_eva(
    tensors: Mapping[str, Tensor], wanted: Iterable[str], names: Mapping[str, str], heads: int
) -> dict[str, Tensor]:
    """Our tensors, by global name, out of a tower's released ones; `names` is `VISION_NAMES` or `TEXT_NAMES`."""
    found = {name: tensors[eva_name(name, names)] for name in wanted}
    return {name: by_head(tensor, heads).flatten(0, 2) if is_fused(name) else tensor for name, tensor in found.items()}


def to_eva(tensors: Mapping[str, Tensor], names: Mapping[str, str], heads: int) -> dict[str, Tensor]:
    """The released tensors out of a tower's own, the inverse of `from_eva`."""
    return {
        eva_name(name, names): separate(tensor, heads) if is_fused(name) else tensor for name, tensor in tensors.items()
    }


def assign(tower: Tower, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, by global name, into this rank's slices of `tower`'s parameters; every name must be there."""
    wanted = {
        f"tower.{name}".replace(".blocks.", ".blocks.layers.", 1): name
        for name in (global_name(tower, local) for local, _ in tower.named_parameters())
    }
    copy_slices({"tower": SimpleNamespace(parts=[tower])}, lambda name: tensors[wanted[name]], wanted)
