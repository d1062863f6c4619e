"""A run of ours as a teacher that is too big for one GPU: split over the tensor-parallel ranks, as it was trained."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from w2s.checkpoint.handover import hand_over
from w2s.checkpoint.store import read_meta
from w2s.config.load import model_from
from w2s.config.sections import ParallelConfig
from w2s.megatron.sharded import ShardedTower
from w2s.megatron.together import Together
from w2s.teachers.base import PatchNetwork, Precision, check_image_size
from w2s.towers.clip import ImageTower
from w2s.towers.vision import MEAN, STD


class ShardedRun(PatchNetwork):
    """Patch tokens of our vision tower, through its projection if it has one: `head(norm(tokens))`.

    The ranks of a tensor-parallel group call it together, each with images of its own.
    """

    def __init__(self, checkpoint: Path, parallel: ParallelConfig, *, image_size: int, precision: Precision) -> None:
        """Load this rank's slices of a checkpoint.

        Args:
            checkpoint: a folder with meta.json.
            parallel: how the ranks are split; without a pipeline.
            image_size: side of the input in pixels, 0 for the size that the weights are of.
            precision: type of the weights.

        Raises:
            ConfigError: the patches do not divide the image.
            CheckpointError: the checkpoint is damaged or has no vision tower.
        """
        model = model_from(read_meta(checkpoint).config)
        size = image_size or model.vision.image_size
        check_image_size(size, model.vision.patch_size)
        vision, alone = replace(model.vision, image_size=size), ParallelConfig(tensor=parallel.tensor)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        tower = ImageTower(vision, model.embed_dim, alone, dtype)
        handover = hand_over(ShardedTower([tower], [tower]), "vision", checkpoint)
        width = vision.width if handover.new else model.embed_dim
        super().__init__(width=width, grid=vision.grid, image_size=size, mean=MEAN, std=STD)
        self.tower, self.has_head = tower, not handover.new
        self.together = Together()

    def forward(self, images: Tensor) -> Tensor:
        """Features of this rank's normalised images, row by row, without CLS."""
        return self.together(self._features, images)

    def _features(self, images: Tensor) -> Tensor:
        tokens = self.tower.patch_tokens(images)
        return self.tower.head(tokens) if self.has_head else tokens
