"""The student of the masked stage: a vision tower that predicts the teacher's features at masked patches."""

import torch
from torch import Tensor, nn

from w2s.config.sections import MimConfig, ParallelConfig, VisionConfig
from w2s.megatron.backend import LOCAL, Linears
from w2s.towers.vision import VisionTower


class MaskedStudent(VisionTower):
    """BEiT-style student: all tokens go through the layers, masked ones as a learned mask token.

    Source: baaivision/EVA, EVA-01/eva/modeling_pretrain.py. A student that drops what is masked has no such token, and
    sees the other patches alone, as under patch dropout.
    """

    def __init__(
        self,
        shape: VisionConfig,
        target_width: int,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        chunk: int = 0,
        linears: Linears = LOCAL,
        drops_masked: bool = False,
    ) -> None:
        super().__init__(shape, target_width, parallel, dtype, chunk, linears)
        self.drops_masked = drops_masked
        if self.first and not drops_masked:
            self.mask_token = nn.Parameter(torch.empty(1, 1, shape.width, dtype=dtype))
        if self.last:
            self.lm_head = nn.Linear(shape.width, target_width, dtype=dtype)

    def forward(self, images: Tensor, masks: Tensor, places: Tensor) -> Tensor:
        """Predict the teacher's features at some patches.

        Args:
            images: [n, 3, side, side], normalised.
            masks: bool [n, patches], True at masked patches.
            places: int64 [n, k], the patches to predict; where the masked ones are dropped, all others.

        Returns:
            [n, k, teacher width] in the last chunk, packed rows elsewhere.
        """
        if self.drops_masked:
            tokens = self.encode(images, kept=places)
            return self.lm_head(tokens[:, 1:]) if self.last else tokens
        tokens = self.encode(images, masks)
        return self.lm_head(at_places(tokens[:, 1:], places)) if self.last else tokens


def masked_places(masks: Tensor, count: int) -> Tensor:
    """Return where masks [n, patches] of exactly `count` patches each are True: int64 [n, count], ascending."""
    # No `nonzero`, which would wait for the device to learn how many there are.
    return masks.byte().topk(count, dim=1).indices.sort(dim=1).values


def places_to_predict(masks: Tensor, mim: MimConfig) -> Tensor:
    """Return the patches of masks [n, patches] that the loss of `mim` is on: int64 [n, k], ascending."""
    count = mim.predicted(masks.shape[1])
    if count == masks.shape[1]:
        return everywhere(masks)
    return masked_places(~masks if mim.predict == "visible" else masks, count)


def everywhere(masks: Tensor) -> Tensor:
    """Return all places of masks [n, patches]: int64 [n, patches], ascending."""
    return torch.arange(masks.shape[1], device=masks.device).expand_as(masks)


def at_places(features: Tensor, places: Tensor) -> Tensor:
    """Pick from patch features [n, patches, d] those at places [n, k]: [n, k, d]."""
    return features.gather(1, places.unsqueeze(-1).expand(-1, -1, features.shape[-1]))


def put_at_places(features: Tensor, places: Tensor, patches: int) -> Tensor:
    """Spread features [n, k, d] of the places [n, k] over all patches, NaN at the others: [n, patches, d]."""
    whole = features.new_full((len(features), patches, features.shape[-1]), torch.nan)
    return whole.scatter(1, places.unsqueeze(-1).expand_as(features), features)
