"""Models of transformers that take more than an image: what else they are given."""

from typing import Any

import torch
from torch import Tensor, nn


def called_with_images(tower: Any) -> nn.Module:
    """A vision tower that is called with images [n, 3, T, T] alone."""
    kind = getattr(getattr(tower, "config", None), "model_type", "")
    return {"siglip2_vision_model": NaFlex, "vit_mae": Unmasked}.get(kind, lambda same: same)(tower)


class NaFlex(nn.Module):
    """SigLIP 2 for images of any shape: it takes patches, and the rows and columns of each image."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower, self.config = tower, tower.config

    def forward(self, images: Tensor, **options: Any) -> Any:
        """What the tower makes of square images."""
        side = self.config.patch_size
        rows, columns = (length // side for length in images.shape[2:])
        patches = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1)
        patches = patches.reshape(len(images), rows * columns, -1)
        shapes = torch.tensor([[rows, columns]] * len(images))
        # All patches count; a mask that says so would be read from the device in every step.
        return self.tower(patches, pixel_attention_mask=None, spatial_shapes=shapes, **options)


class Unmasked(nn.Module):
    """A masked autoencoder's encoder with all patches in their order: it would drop most and shuffle the rest."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower, self.config = tower, tower.config
        self.config.mask_ratio = 0.0

    def forward(self, images: Tensor, **options: Any) -> Any:
        """What the tower makes of whole images."""
        places = (images.shape[2] // self.config.patch_size) * (images.shape[3] // self.config.patch_size)
        order = torch.arange(places, device=images.device).expand(len(images), -1)
        return self.tower(images, noise=order, **options)
