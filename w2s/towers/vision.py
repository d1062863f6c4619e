"""The vision transformer of EVA, or of CLIP: patch embedding, CLS token, learned positions, layers, final norm."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from w2s.config.sections import ParallelConfig, VisionConfig
from w2s.megatron.backend import LOCAL, Linears
from w2s.megatron.split import vision_layers
from w2s.megatron.taps import Tap
from w2s.megatron.tower import StackShape, Tower
from w2s.towers.norms import make_norm
from w2s.towers.patches import PatchEmbedding

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the input's channels, pixels in 0..1 (CLIP's)."""
STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the input's channels (CLIP's)."""


def vision_stack(config: VisionConfig, head_width: int, parallel: ParallelConfig) -> StackShape:
    """Return the shape of the vision tower's layers.

    Sources: baaivision/EVA, shinji/eva_clip/eva_vit_model.py; openai/CLIP, clip/model.py, `VisionTransformer`.

    Args:
        config: the tower.
        head_width: channels that its head gives.
        parallel: how it is split over pipeline stages.
    """
    return StackShape(
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        mlp_width=config.mlp_width,
        norm=config.norm,
        norm_placement=config.norm_placement,
        norm_eps=config.norm_eps,
        qkv_bias=config.biases,
        activation=config.activation,
        causal=False,
        split=vision_layers(config, head_width, parallel),
    )


def image_head(config: VisionConfig, embed_dim: int, dtype: torch.dtype) -> nn.Linear:
    """Return the projection of the CLS token into the space shared with text."""
    return nn.Linear(config.width, embed_dim, bias=config.head_bias, dtype=dtype)


class VisionTower(Tower):
    """Images to normed tokens; the masked student and CLIP's image tower put a head on it.

    Attributes:
        shape: the configuration that it was built from.
    """

    # Megatron's FSDP deals out whole rows: those of a patch's pixels divide no other's.
    gathered_apart = (PatchEmbedding,)

    def __init__(
        self,
        shape: VisionConfig,
        head_width: int,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        chunk: int = 0,
        linears: Linears = LOCAL,
    ) -> None:
        super().__init__(vision_stack(shape, head_width, parallel), parallel, dtype, chunk, linears)
        self.shape = shape
        if self.first:
            has_bias = shape.kind == "eva"
            self.patch_embed = PatchEmbedding(shape.patch_size, shape.width, dtype, bias=has_bias)
            self.cls_token = nn.Parameter(torch.empty(1, 1, shape.width, dtype=dtype))
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + shape.patches, shape.width, dtype=dtype))
            if shape.kind == "clip":
                self.norm_pre = make_norm(shape.norm, shape.width, shape.norm_eps, dtype)
        if self.last:
            self.norm = make_norm(shape.norm, shape.width, shape.norm_eps, dtype)

    def encode(
        self,
        images: Tensor,
        masks: Tensor | None = None,
        kept: Tensor | None = None,
        taps: Mapping[int, Tap] | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """Run the tower up to its final norm, or up to the end of this chunk.

        Args:
            images: [n, 3, side, side], normalised.
            masks: bool [n, patches], True where the mask token takes a patch's place; None masks nothing.
            kept: int64 [n, k], the patches that patch dropout keeps; None keeps all.
            taps: losses of the tokens [n, 1 + patches (or k), width] after layers of this chunk, by the layer's number.
            branches: [n, layers, 2], what drop path multiplies the layers' branches with; None leaves none out.

        Returns:
            Tokens [n, 1 + patches (or k), width] with CLS first in the last chunk, packed rows elsewhere.
        """
        embedded = self._embed(images, masks, kept) if self.first else None
        patches = self.shape.patches if kept is None else kept.shape[1]
        tokens = self.run_layers(embedded, len(images), 1 + patches, taps, branches)
        return self.norm(tokens) if self.last else tokens

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Return the patch tokens after the final norm, without CLS: [n, patches, width] in the last chunk."""
        tokens = self.encode(images)
        return tokens[:, 1:] if self.last else tokens

    def _embed(self, images: Tensor, masks: Tensor | None, kept: Tensor | None) -> Tensor:
        patches = self.patch_embed(images, kept)
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token, patches)
        patches = patches + (self.pos_embed[:, 1:] if kept is None else self.pos_embed[0, 1:][kept])
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([cls_token, patches], dim=1)
        return self.norm_pre(tokens) if self.shape.kind == "clip" else tokens
