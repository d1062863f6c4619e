"""SigLIP's pooling: a learned probe that attends to all tokens, and an MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.kernels.gelu import Activation


class AttentionPool(nn.Module):
    """Tokens to one vector: y + MLP(norm(y)) for y, what a probe gathers of them by multi-head attention.

    Source: google-research/big_vision, models/vit.py, `MAPHead` (Zhai et al. 2022, arXiv 2106.04560). Names and shapes
    of the weights are those of timm's `AttentionPoolLatent`.
    """

    def __init__(
        self, width: int, heads: int, mlp_width: int, activation: Activation, norm_eps: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, width, dtype=dtype))
        self.q = nn.Linear(width, width, dtype=dtype)
        self.kv = nn.Linear(width, 2 * width, dtype=dtype)
        self.proj = nn.Linear(width, width, dtype=dtype)
        self.norm = nn.LayerNorm(width, eps=norm_eps, dtype=dtype)
        self.mlp = PoolMLP(width, mlp_width, activation, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens [n, t, width]: [n, width]."""
        query, key, value = self._heads(tokens)
        gathered = F.scaled_dot_product_attention(query, key, value)
        pooled: Tensor = self.proj(gathered.flatten(1))
        return pooled + self.mlp(self.norm(pooled))

    def weights(self, tokens: Tensor) -> Tensor:
        """Return what the probe attends to of tokens [n, t, width], mean over the heads: float32 [n, t]."""
        query, key, _ = self._heads(tokens)
        scores = query.float() @ key.float().mT * query.shape[-1] ** -0.5
        return scores.softmax(-1).mean(1)[:, 0]

    def _heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q of the probe [n, heads, 1, d], K and V of the tokens [n, heads, t, d]."""
        query = self.q(self.latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query.expand(len(tokens), -1, -1, -1), key, value


class PoolMLP(nn.Module):
    """Two linears and an activation between them."""

    def __init__(self, width: int, mlp_width: int, activation: Activation, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, mlp_width, dtype=dtype)
        self.fc2 = nn.Linear(mlp_width, width, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, width] to features [n, width]."""
        active, _ = self.activation(F.linear(features, self.fc1.weight), self.fc1.bias)
        hidden: Tensor = self.fc2(active)
        return hidden
