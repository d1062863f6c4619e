"""Weights of a single tower as the released models have them, and as ours has them."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from w2s.checkpoint.weights.eva_format import is_fused, separate, split_heads, translate


def from_eva(
    tensors: Mapping[str, Tensor], wanted: Iterable[str], names: Mapping[str, str], heads: int
) -> dict[str, Tensor]:
    """Return our tensors out of a tower's released ones.

    Args:
        tensors: released tensors by released name, without the tower's prefix.
        wanted: our global names.
        names: `VISION_NAMES` or `TEXT_NAMES`.
        heads: attention heads of the tower.

    Raises:
        KeyError: a released tensor is missing.
    """
    found = {name: tensors[translate(name, names)] for name in wanted}
    return {name: interleave(tensor, heads) if is_fused(name) else tensor for name, tensor in found.items()}


def to_eva(tensors: Mapping[str, Tensor], names: Mapping[str, str], heads: int) -> dict[str, Tensor]:
    """Return the released tensors out of a tower's own, the inverse of `from_eva`."""
    return {
        translate(name, names): separate(tensor, heads) if is_fused(name) else tensor
        for name, tensor in tensors.items()
    }


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows from (q | k | v), each in heads, to Megatron's (q, k, v) of a head next to each other."""
    return split_heads(rows, heads).flatten(0, 2)
