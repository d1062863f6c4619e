"""A run of ours as a teacher that is too big for one GPU: split over the tensor-parallel ranks, as it was trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.starts.handover import hand_over
from w2s.checkpoint.weights.released import open_released
from w2s.config.load import model_from
from w2s.config.sections import ParallelConfig, Weights
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.megatron.parallel.tp_gather import TensorParallelGather
from w2s.teachers.base import Features, PatchNetwork, Precision, check_image_size
from w2s.towers.clip import ImageTower
from w2s.towers.vision import channel_statistics


class ShardedRun(PatchNetwork):
    """Patch tokens of our vision tower: `head(norm(tokens))` of a clip run, `norm(tokens)` of a masked run.

    The summary is the class token, through the projection if there is one; of a SigLIP's tower what its pool gives, or
    the mean of all tokens if there is none.

    The ranks of a tensor-parallel group call it together, each with images of its own.
    """

    def __init__(
        self,
        checkpoint: Path,
        parallel: ParallelConfig,
        *,
        image_size: int,
        precision: Precision,
        weights: Weights = "last",
    ) -> None:
        """Load this rank's slices of a checkpoint; `image_size` 0 is the size that its weights are of.

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
        handover = hand_over(ShardedTower([tower], [tower]), "vision", checkpoint, weights=weights)
        embeds, masked, (mean, std) = not handover.new, open_released(checkpoint).is_masked, channel_statistics(vision)
        super().__init__(
            width=model.embed_dim if embeds and not masked else vision.width,
            summary_width=model.embed_dim if embeds else vision.width,
            grid=vision.grid,
            image_size=size,
            mean=mean,
            std=std,
        )
        self.tower, self.embeds = tower, embeds
        projects = embeds and not masked and vision.class_tokens
        self.head = tower.head if projects else nn.Identity()
        self.tp_gather = TensorParallelGather()

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of this rank's normalised images, row by row, without CLS."""
        joined = self.tp_gather(self._features, images)
        patches, summary = joined.split([self.grid**2 * self.width, self.summary_width], dim=1)
        return Features(patches.unflatten(1, (-1, self.width)), summary)

    def _features(self, images: Tensor) -> Tensor:
        """Patch features and summary of each image in one row, as the group returns one tensor."""
        tokens = self.tower.encode(images)
        summary = self.tower.embedding(tokens, self.tower.head) if self.embeds else self._unprojected(tokens)
        return torch.cat([self.head(self.tower.of_patches(tokens)).flatten(1), summary], dim=1)

    def _unprojected(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.tower.shape.class_tokens else tokens.mean(1)
