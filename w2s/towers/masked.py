"""The student of the masked stage: a vision tower that predicts the teacher's features at masked patches."""

import torch
from torch import Tensor, nn

from w2s.config.sections import ParallelConfig, VisionConfig
from w2s.towers.vision import VisionTower


class MaskedStudent(VisionTower):
    """BEiT-style student: all tokens go through the layers, masked ones as a learned mask token.

    Source: baaivision/EVA, EVA-01/eva/modeling_pretrain.py.
    """

    def __init__(self, shape: VisionConfig, target_width: int, parallel: ParallelConfig, dtype: torch.dtype) -> None:
        super().__init__(shape, parallel, dtype)
        if self.first:
            self.mask_token = nn.Parameter(torch.empty(1, 1, shape.width, dtype=dtype))
        if self.last:
            self.lm_head = nn.Linear(shape.width, target_width, dtype=dtype)

    def forward(self, images: Tensor, masks: Tensor, masked_rows: Tensor) -> Tensor:
        """Predict the teacher's features at the masked patches.

        Args:
            images: [n, 3, side, side], normalised.
            masks: bool [n, patches], True at masked patches.
            masked_rows: int64 [m], the masked patches' places among all n * patches.

        Returns:
            [m, teacher width] on the last pipeline stage, packed rows elsewhere.
        """
        tokens = self.encode(images, masks)
        if not self.last:
            return tokens
        return self.lm_head(tokens[:, 1:].flatten(0, 1).index_select(0, masked_rows))
