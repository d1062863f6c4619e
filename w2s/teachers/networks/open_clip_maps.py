"""Vision towers of open_clip that are not ViTs, as teachers: a feature is a place of the last feature map, projected.

The tower's own head is applied to each place as if it were the whole map: a mean over the map is the place itself. The
summary is `encode_image`.
"""

from collections.abc import Sequence

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from w2s.teachers.base import Features, PatchNetwork, check_image_size, resample
from w2s.teachers.networks.timm_vit import sizes_of, to_tokens

RESNET_STRIDE = 32


class OpenClipMaps(PatchNetwork):
    """The last map of a timm trunk in open_clip, such as ConvNeXt: pooling, norm and projection at each place."""

    def __init__(
        self, visual: TimmModel, name: str, *, image_size: int, width: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """Wrap the vision tower of the open_clip model `name`.

        Args:
            visual: the tower.
            name: its model, for errors.
            image_size: side of the input in pixels, 0 for the model's own.
            width: width of the space shared with text.
            mean, std: what the input must be normalised with.

        Raises:
            ConfigError: the image size does not suit the model.
        """
        size = image_size or visual.image_size[0]
        grid, _ = sizes_of(visual.trunk, visual.trunk.forward_head, name, size)
        super().__init__(width=width, summary_width=width, grid=grid, image_size=size, mean=mean, std=std)
        self.visual = visual

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised images, row by row."""
        maps = self.visual.trunk.forward_features(images)
        return Features(self._positions(maps), self.visual.head(self.visual.trunk.forward_head(maps)))

    def _positions(self, maps: Tensor) -> Tensor:
        trunk = self.visual.trunk
        positions = to_tokens(trunk, maps)
        alone = positions.flatten(0, 1)
        if hasattr(trunk, "num_prefix_tokens"):
            # whether the head takes the first token or the mean of the patches
            alone = alone[:, None].expand(-1, trunk.num_prefix_tokens + 1, -1)
        elif getattr(trunk, "output_fmt", "NCHW") == "NHWC":
            alone = alone[:, None, None]
        else:
            alone = alone[:, :, None, None]
        features: Tensor = self.visual.head(trunk.forward_head(alone))
        return features.unflatten(0, positions.shape[:2])


class OpenClipResNet(PatchNetwork):
    """The last map of OpenAI's ResNets: the attention pool's value and output projections at each place.

    What the pool gives where it attends to nothing but that place, without its position (Zhou et al. 2022, MaskCLIP).
    """

    def __init__(self, visual: ModifiedResNet, *, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """Wrap the vision tower of an open_clip model.

        Args:
            visual: the tower.
            image_size: side of the input in pixels, 0 for the model's own.
            mean, std: what the input must be normalised with.

        Raises:
            ConfigError: `image_size` is not a multiple of 32.
        """
        size = image_size or visual.image_size
        check_image_size(size, RESNET_STRIDE)
        width, grid = visual.output_dim, size // RESNET_STRIDE
        super().__init__(width=width, summary_width=width, grid=grid, image_size=size, mean=mean, std=std)
        self.visual = visual
        _resize_pool(visual, grid)

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised images, row by row."""
        outputs = self.visual.forward_intermediates(images, indices=1)
        positions = outputs["image_intermediates"][0].flatten(2).transpose(1, 2)
        pool = self.visual.attnpool
        return Features(pool.c_proj(pool.v_proj(positions)), outputs["image_features"])


def _resize_pool(visual: ModifiedResNet, grid: int) -> None:
    """Resample the attention pool's positions, that of the mean first, for a map of `grid` x `grid` places."""
    embedding = visual.attnpool.positional_embedding.detach()
    positions = resample(embedding[None, 1:], visual.image_size // RESNET_STRIDE, grid)[0]
    visual.attnpool.positional_embedding = nn.Parameter(torch.cat([embedding[:1], positions]))
