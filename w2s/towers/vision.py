"""The vision transformer of EVA, CLIP or SigLIP: patch embedding, learned positions, layers, final norm.

Those of EVA and CLIP have a CLS token, which a projection takes into the space shared with text.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from w2s.config.sections import ParallelConfig, VisionConfig
from w2s.megatron.fp8.linears import LOCAL, Linears
from w2s.megatron.model.pipeline_split import vision_layers
from w2s.megatron.model.taps import Tap
from w2s.megatron.model.tower import ACTIVATIONS, Tower, TransformerShape
from w2s.towers.attention_pool import AttentionPool
from w2s.towers.norms import make_norm
from w2s.towers.patches import PatchEmbedding

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the input's channels, pixels in 0..1 (CLIP's)."""
STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the input's channels (CLIP's)."""

Channels = tuple[float, float, float]


def channel_statistics(config: VisionConfig) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of the input's channels: CLIP's, or what takes pixels to -1..1 (SigLIP)."""
    return ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) if config.kind == "siglip" else (MEAN, STD)


def vision_stack(config: VisionConfig, head_width: int, parallel: ParallelConfig) -> TransformerShape:
    """Return the shape of the layers of a vision tower whose head gives `head_width` channels.

    Sources: baaivision/EVA, shinji/eva_clip/eva_vit_model.py; openai/CLIP, clip/model.py, `VisionTransformer`;
    google-research/big_vision, models/vit.py.
    """
    return TransformerShape(
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


def image_head(config: VisionConfig, embed_dim: int, dtype: torch.dtype) -> nn.Module:
    """Return what makes an embedding: a projection of the CLS token, or without one a pool over all tokens."""
    if not config.class_tokens:
        activation = ACTIVATIONS[config.activation]
        return AttentionPool(config.width, config.heads, config.mlp_width, activation, config.norm_eps, dtype)
    return nn.Linear(config.width, embed_dim, bias=config.head_bias, dtype=dtype)


class VisionTower(Tower):
    """Images to normed tokens; the masked student and CLIP's image tower put a head on it.

    Attributes:
        shape: the configuration that it was built from.
    """

    # Megatron's FSDP deals out whole rows: those of a patch's pixels, and of the pool's MLP, divide no other's.
    fsdp_units = (PatchEmbedding, AttentionPool)

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
            self.patch_embed = PatchEmbedding(shape.patch_size, shape.width, dtype, bias=shape.patch_bias)
            if shape.class_tokens:
                self.cls_token = nn.Parameter(torch.empty(1, 1, shape.width, dtype=dtype))
            self.pos_embed = nn.Parameter(torch.empty(1, shape.tokens, shape.width, dtype=dtype))
            if shape.norm_pre:
                self.norm_pre = make_norm(shape.norm, shape.width, shape.norm_eps, dtype)
        if self.last:
            self.norm = make_norm(shape.norm, shape.width, shape.norm_eps, dtype)

    def encode(
        self,
        images: Tensor,
        masks: Tensor | None = None,
        kept: Tensor | None = None,
        taps: Mapping[int, Tap] | None = None,
        branch_scales: Tensor | None = None,
    ) -> Tensor:
        """Run the tower up to its final norm, or up to the end of this chunk.

        Args:
            images: [n, 3, side, side], normalised.
            masks: bool [n, patches], True where the mask token takes a patch's place; None masks nothing.
            kept: int64 [n, k], the patches that patch dropout keeps; None keeps all.
            taps: losses of the tokens [n, tokens, width] after layers of this chunk, by the layer's index.
            branch_scales: [n, layers, 2], what drop path multiplies the layers' branches with; None leaves none out.

        Returns:
            Tokens [n, patches (or k), width], after that of CLS if there is one, in the last chunk, packed tokens
            elsewhere.
        """
        embedded = self._embed(images, masks, kept) if self.first else None
        patches = self.shape.patches if kept is None else kept.shape[1]
        tokens = self.run_layers(embedded, len(images), self.shape.class_tokens + patches, taps, branch_scales)
        return self.norm(tokens) if self.last else tokens

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Return the patch tokens after the final norm, without CLS: [n, patches, width] in the last chunk."""
        tokens = self.encode(images)
        return self.of_patches(tokens) if self.last else tokens

    def embedding(self, tokens: Tensor, head: nn.Module) -> Tensor:
        """Put a head, see `image_head`, on the normed tokens [n, tokens, width]: [n, embed_dim]."""
        embedded: Tensor = head(tokens[:, 0] if self.shape.class_tokens else tokens)
        return embedded

    def of_patches(self, tokens: Tensor) -> Tensor:
        """Return the tokens of an image [n, tokens, d] without that of CLS: [n, patches, d]."""
        return tokens[:, self.shape.class_tokens :]

    def _embed(self, images: Tensor, masks: Tensor | None, kept: Tensor | None) -> Tensor:
        patches = self.patch_embed(images, kept)
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token, patches)
        positions = self.of_patches(self.pos_embed)
        tokens = patches + (positions if kept is None else positions[0, kept])
        if self.shape.class_tokens:
            cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
            tokens = torch.cat([cls_token, tokens], dim=1)
        return self.norm_pre(tokens) if self.shape.norm_pre else tokens
