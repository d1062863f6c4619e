"""The patch embedding: a convolution whose stride is its kernel, which is a product for every patch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Conv2d):
    """Embeds the patches that are wanted and no others; it has the weights of a convolution."""

    def __init__(self, patch_size: int, width: int, dtype: torch.dtype, bias: bool = True) -> None:
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size, dtype=dtype, bias=bias)
        self.patch_size = patch_size

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Embed images [n, 3, side, side], at the patches `kept` [n, k] or, for None, at all: [n, k, width]."""
        size = self.patch_size
        parts = images.to(self.weight.dtype).unflatten(3, (-1, size)).unflatten(2, (-1, size))
        pixels = parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        if kept is not None:
            pixels = pixels.gather(1, kept.unsqueeze(-1).expand(-1, -1, pixels.shape[-1]))
        return F.linear(pixels, self.weight.flatten(1), self.bias)
