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

    def __init__(self, network: PatchNetwork, *, grid: int, precision: Literal["fp32", "bf16"] = "fp32") -> None:
        """Freeze `network` for a student of `grid` x `grid` patches."""
        super().__init__()
        self.network = network
        self.grid = grid
        self.precision = precision
        self.width = network.width
        self.image_size = network.image_size
        self.mean = network.mean
        self.std = network.std
        self.requires_grad_(False)
        self.train(False)
        if network.grid != grid:
            sizes = (network.grid, network.grid, grid, grid)
            logger.info("the teacher's %dx%d features are resampled onto the student's %dx%d patches", *sizes)

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


def input_size(image_size: int, *, patch: int, grid: int) -> int:
    """Side of a teacher's input in pixels: `image_size`, or for 0 the one that gives a feature per student patch.

    Raises:
        ConfigError: patches of `patch` pixels do not divide it.
    """
    if image_size % patch:
        fits = max(1, round(image_size / patch)) * patch
        raise ConfigError(f"teacher.image_size={image_size} is not a multiple of its patch size {patch}: use {fits}")
    return image_size or patch * grid


def _rgb(values: Sequence[float]) -> RGB:
    red, green, blue = values
    return float(red), float(green), float(blue)
