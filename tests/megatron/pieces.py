"""Whole tensors out of what the ranks of a layout hold."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Pieces = dict[str, tuple[Tensor, int | None]]
"""Tensors by global name, with the axis that tensor-parallel ranks split them over."""


def axis_of(parameter: nn.Parameter) -> int | None:
    """The axis that a parameter is split over, if it is."""
    return int(parameter.partition_dim) if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def join_pieces(everyone: Sequence[Pieces]) -> dict[str, Tensor]:
    """Make whole tensors of what the ranks hold, ranks in their order; copies must be equal to the bit."""
    found: dict[str, list[Tensor]] = {}
    axes: dict[str, int | None] = {}
    for pieces in everyone:
        for name, (piece, axis) in pieces.items():
            found.setdefault(name, []).append(piece)
            axes[name] = axis
    return {name: _whole(name, pieces, axes[name]) for name, pieces in found.items()}


def _whole(name: str, pieces: list[Tensor], axis: int | None) -> Tensor:
    distinct = [piece for n, piece in enumerate(pieces) if not any(torch.equal(piece, p) for p in pieces[:n])]
    if axis is None:
        assert len(distinct) == 1, f"{name} differs between ranks"
        return distinct[0]
    return torch.cat(distinct, axis)
