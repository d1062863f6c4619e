"""The one interface of all teachers: images in, patch features on the student's grid and a summary out."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.data.samples.batch import normalize
from w2s.errors import ConfigError

logger = logging.getLogger(__name__)

RGB = tuple[float, float, float]
Precision = Literal["fp32", "bf16"]


class Features(NamedTuple):
    """What one forward pass of a teacher makes of n images, row by row and without CLS where it is of patches."""

    patches: Tensor
    """The features that a student regresses: [n, P, D]."""
    summary: Tensor
    """One vector per image: a CLIP's image embedding, not normalised; elsewhere the pooled feature: [n, E]."""
    layers: tuple[Tensor, ...] = ()
    """Patch tokens after the layers that were asked for, in that order, without a norm: [n, P, layer width] each."""

    @classmethod
    def join(cls, parts: "Sequence[Features]") -> "Features":
        """Join the features of several batches."""
        patches, summaries, layers = zip(*parts, strict=True)
        return cls(torch.cat(patches), torch.cat(summaries), tuple(map(torch.cat, zip(*layers, strict=True))))


class PatchNetwork(nn.Module, ABC):
    """What a teacher is made of: a network from images to patch features on a grid of its own.

    Attributes:
        width: channels of a feature, D.
        summary_width: channels of the summary, E.
        depth: transformer layers whose tokens can be asked for; 0 where there are none.
        layer_width: channels of their tokens.
        grid: features along one side.
        image_size: side of the input in pixels, T.
        mean, std: what the input must be normalised with, in units of 0..1 RGB.
    """

    def __init__(
        self,
        *,
        width: int,
        summary_width: int,
        grid: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        depth: int = 0,
        layer_width: int = 0,
    ) -> None:
        super().__init__()
        self.width = width
        self.summary_width = summary_width
        self.depth = depth
        self.layer_width = layer_width
        self.grid = grid
        self.image_size = image_size
        self.mean = _rgb(mean)
        self.std = _rgb(std)

    @abstractmethod
    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised images [n, 3, T, T] on the network's own grid, P = grid * grid.

        `layers` are those whose tokens are wanted too, each below `depth`.
        """


class Teacher(nn.Module):
    """A frozen vision model whose features are what a student learns from.

    It stays in evaluation mode and has no gradients. Features of another grid are resampled bicubically onto the
    student's. They are the model's own: normalising targets is the business of `w2s.teachers.distillation.targets`.

    Attributes:
        width: channels of a feature, D.
        summary_width: channels of the summary, E.
        layer_width: channels of the tokens after a layer; 0 where there are no layers to ask for.
        image_size: side of the input in pixels, T.
        mean, std: what the input must be normalised with, in units of 0..1 RGB.
    """

    _home: Tensor

    def __init__(
        self, network: PatchNetwork, *, grid: int, precision: Precision = "fp32", compiled: bool = False
    ) -> None:
        """Freeze `network` for a student of `grid` x `grid` patches; `compiled` puts it through torch.compile."""
        super().__init__()
        self.network = network
        self.grid = grid
        self.precision = precision
        self.width = network.width
        self.summary_width = network.summary_width
        self.layer_width = network.layer_width
        self.image_size = network.image_size
        self.mean = network.mean
        self.std = network.std
        if precision == "bf16":
            _hold_in_bf16(network)
        self.requires_grad_(False)
        self.train(False)
        self.register_buffer(
            "_home", torch.empty(0), persistent=False
        )  # where images go; a network may have no weights
        if compiled:
            network.compile()
        if network.grid != grid:
            logger.info(
                "the teacher sees %d px: its %dx%d features are resampled onto the student's %dx%d patches",
                network.image_size, network.grid, network.grid, grid, grid,
            )  # fmt: skip

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised float images [n, 3, T, T], in float32 and on the student's grid.

        `layers` are those whose tokens are wanted too (see `check_layers`).
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features = self.network(images, layers)
        patches, *after = (
            resample(each.float(), self.network.grid, self.grid) for each in (features.patches, *features.layers)
        )
        return Features(patches, features.summary.float(), tuple(after))

    def features_of(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of images as they are decoded, uint8 [n, 3, T, T], on any device; `layers` as in `forward`."""
        features: Features = self(normalize(images.to(self._home.device), self.mean, self.std), layers)
        return features

    def check_layers(self, layers: Sequence[int], key: str) -> None:
        """Refuse layers that this teacher has not, or whose tokens it does not give; `key` names them in the message.

        Raises:
            ConfigError: with the layers that there are.
        """
        depth = self.network.depth
        if layers and not depth:
            raise ConfigError(f"{key}: the layers of this teacher give no tokens, choose a vision transformer")
        for layer in layers:
            if not 0 <= layer < depth:
                raise ConfigError(f"{key}: the teacher has no layer {layer}, its layers are 0 to {depth - 1}")

    @staticmethod
    def pooled(features: Tensor) -> Tensor:
        """One vector per image, for k-NN: the mean over the patches, [n, P, D] -> [n, D]."""
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
