"""The norm outside the layers: after the last one, and before the head."""

import torch
from torch import nn


def make_norm(kind: str, width: int, eps: float, dtype: torch.dtype) -> nn.Module:
    """Return an RMSNorm (`rmsnorm`) or a LayerNorm (`layernorm`) of a width."""
    norm = nn.RMSNorm if kind == "rmsnorm" else nn.LayerNorm
    return norm(width, eps=eps, dtype=dtype)
