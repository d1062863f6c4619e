"""The one interface of all teachers: images in, patch features on the student's grid out."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.errors import ConfigError

logger = logging.getLogger(__name__)

RGB = tuple[float, float, float]
Precision = Literal["fp32", "bf16"]


class PatchNetwork(nn.Module, ABC):
    """What a teacher is made of: a network from images to patch features on a grid of its own.

    Attributes:
        width: channels of a feature, D.
        grid: features along one side.
        image_size: side of the input in pixels, T.
        mean, std: what the input must be normalised with, in units of 0..1 RGB.
    """

    def __init__(self, *, width: int, grid: int, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.width = width
        self.grid = grid
        self.image_size = image_size
        self.mean = _rgb(mean)
        self.std = _rgb(std)

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features of normalised images [n, 3, T, T]: [n, grid * grid, D], row by row, without CLS."""


class Teacher(nn.Module):
    """A frozen vision model whose patch features are the targets of the masked stage.

    It stays in evaluation mode and has no gradients. Features of another grid are resampled bicubically onto the
    student's. They are the model's own: normalising targets is the business of `w2s.teachers.targets`.

    Attributes:
        width: channels of a feature, D.
        image_size: side of the input in pixels, T.
        mean, std: what the input must be normalised with, in units of 0..1 RGB.
    """

    def __init__(
        self, network: PatchNetwork, *, grid: int, precision: Precision = "fp32", compiled: bool = False
    ) -> None:
        """Freeze `network` for a student of `grid` x `grid` patches; `compiled` puts it through torch.compile."""
        super().__init__()
        self.network = network
        self.grid = grid
        self.precision = precision
        self.width = network.width
        self.image_size = network.image_size
        self.mean = network.mean
        self.std = network.std
        if precision == "bf16":
            _hold_in_bf16(network)
        self.requires_grad_(False)
        self.train(False)
        if compiled:
            network.compile()
        if network.grid != grid:
            size, own, sizes = network.image_size, (network.grid, network.grid), (grid, grid)
            logger.info(
                "the teacher sees %d px: its %dx%d features are resampled onto the student's %dx%d patches",
                size, *own, *sizes,
            )  # fmt: skip

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of normalised float images [n, 3, T, T]: float32 [n, grid * grid, D], row by row, without CLS."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features = self.network(images)
        return resample(features.float(), self.network.grid, self.grid)

    @staticmethod
    def pooled(features: Tensor) -> Tensor:
        """One vector an image, for k-NN: the mean over the patches, [n, P, D] -> [n, D]."""
        return features.mean(1)


def resample(features: Tensor, old: int, new: int) -> Tensor:
    """Bicubic resampling of patch features [n, old * old, D] to [n, new * new, D], antialiased when shrinking."""
    if old == new:
        return features
    maps = features.transpose(1, 2).unflatten(2, (old, old))
    maps = F.interpolate(maps, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2)


def check_image_size(image_size: int, patch: int) -> None:
    """Refuse a teacher's input size in pixels that its patches do not divide.

    Raises:
        ConfigError: with the nearest size that they divide.
    """
    if image_size % patch:
        fits = max(1, round(image_size / patch)) * patch
        raise ConfigError(f"teacher.image_size={image_size} is not a multiple of its patch size {patch}: use {fits}")


def _hold_in_bf16(network: nn.Module) -> None:
    """Store what autocast would turn into bfloat16 at every call as that: half the memory, the same numbers."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)


def _rgb(values: Sequence[float]) -> RGB:
    red, green, blue = values
    return float(red), float(green), float(blue)
