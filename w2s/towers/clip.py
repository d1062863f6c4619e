"""The two towers of a CLIP: images and captions into one space."""

import torch
from torch import Tensor, nn

from w2s.config.sections import ParallelConfig, TextConfig, VisionConfig
from w2s.megatron.fp8.linears import LOCAL, Linears
from w2s.megatron.model.pipeline_split import text_layers
from w2s.megatron.model.tower import Tower, TransformerShape
from w2s.towers.norms import make_norm
from w2s.towers.vision import VisionTower, image_head

TEXT_NORM_EPS = 1e-5


class ImageTower(VisionTower):
    """The vision tower with a head: a projection of the CLS token, or a pool over all tokens.

    Sources: baaivision/EVA, shinji/eva_clip/eva_vit_model.py; google-research/big_vision, models/vit.py.
    """

    def __init__(
        self,
        shape: VisionConfig,
        embed_dim: int,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        chunk: int = 0,
        linears: Linears = LOCAL,
    ) -> None:
        super().__init__(shape, embed_dim, parallel, dtype, chunk, linears)
        if self.last:
            self.head = image_head(shape, embed_dim, dtype)

    def forward(self, images: Tensor, kept: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
        """Embed images, or clips: the mean over their frames' embeddings (EVA-CLIP-18B, section 4).

        Args:
            images: [n, 3, side, side], normalised; of clips [n, frames, 3, side, side].
            kept: int64 [n, k], the patches that patch dropout keeps; None keeps all. Of clips [n, frames, k].
            branch_scales: [n, layers, 2], what drop path multiplies the layers' branches with; None leaves none out. Of
                clips [n, frames, layers, 2].

        Returns:
            [n, embed_dim], not normalised, in the last chunk; packed tokens elsewhere.
        """
        if images.ndim == 5:
            flat = [None if each is None else each.flatten(0, 1) for each in (kept, branch_scales)]
            embedded = self.forward(images.flatten(0, 1), *flat)
            return embedded.unflatten(0, (len(images), -1)).mean(1) if self.last else embedded
        tokens = self.encode(images, kept=kept, branch_scales=branch_scales)
        return self.embedding(tokens, self.head) if self.last else tokens

    def embed_and_pool(self, images: Tensor) -> Tensor:
        """Embed images and average their patch tokens, in one pass.

        Args:
            images: [n, 3, side, side], normalised.

        Returns:
            float32 [n, embed_dim + width], the embedding first, in the last chunk; packed tokens elsewhere.
        """
        tokens = self.encode(images)
        if not self.last:
            return tokens
        return torch.cat([self.embedding(tokens, self.head).float(), self.of_patches(tokens).float().mean(1)], dim=1)


class TextTower(Tower):
    """CLIP's causal text transformer; it also keeps the scalars of the loss, which live where the features are made.

    Source: baaivision/EVA, shinji/eva_clip/transformer.py. SigLIP's loss has a bias beside its scale (`logit_bias`).
    """

    def __init__(
        self,
        shape: TextConfig,
        embed_dim: int,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        chunk: int = 0,
        logit_bias: bool = False,
        linears: Linears = LOCAL,
    ) -> None:
        stack = TransformerShape(
            layers=shape.layers,
            width=shape.width,
            heads=shape.heads,
            mlp_width=shape.mlp_width,
            norm="layernorm",
            norm_placement="pre",
            norm_eps=TEXT_NORM_EPS,
            qkv_bias="qkv",
            activation=shape.activation,
            causal=True,
            split=text_layers(shape, embed_dim, parallel),
        )
        super().__init__(stack, parallel, dtype, chunk, linears)
        self.shape = shape
        if self.first:
            self.token_embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.width, dtype=dtype))
            self.positional_embedding = nn.Parameter(torch.empty(shape.context_length, shape.width, dtype=dtype))
        if self.last:
            self.ln_final = make_norm("layernorm", shape.width, TEXT_NORM_EPS, dtype)
            self.text_projection = nn.Parameter(torch.empty(shape.width, embed_dim, dtype=dtype))
            # bfloat16 cannot hold ln 100.
            self.logit_scale = nn.Parameter(torch.empty((), dtype=torch.float32))
            if logit_bias:
                self.logit_bias = nn.Parameter(torch.empty((), dtype=torch.float32))

    def logit_parameters(self) -> list[nn.Parameter]:
        """Return the logit scale and, if there is one, the logit bias; the last chunk has them."""
        return [parameter for name, parameter in self.named_parameters() if name in ("logit_scale", "logit_bias")]

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed captions.

        Args:
            tokens: int64 [n, context]; the end token has the largest id.

        Returns:
            [n, embed_dim], not normalised, in the last chunk; packed tokens elsewhere.
        """
        embedded = self.token_embedding[tokens] + self.positional_embedding if self.first else None
        hidden = self.run_layers(embedded, *tokens.shape)
        if not self.last:
            return hidden
        ends = hidden[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=-1)]
        return self.ln_final(ends) @ self.text_projection
