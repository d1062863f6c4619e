"""The norm outside the layers: after the last one, and before the head."""

import torch
from torch import Tensor, nn

from w2s.kernels.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with a weight."""

    eps: float

    def forward(self, hidden: Tensor) -> Tensor:
        """Return norm(hidden): [..., width]."""
        return rms_norm(hidden, self.weight, self.eps)


def make_norm(kind: str, width: int, eps: float, dtype: torch.dtype) -> nn.Module:
    """Return an RMSNorm (`rmsnorm`) or a LayerNorm (`layernorm`) of a width."""
    norm = RMSNorm if kind == "rmsnorm" else nn.LayerNorm
    return norm(width, eps=eps, dtype=dtype)
