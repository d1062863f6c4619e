"""What a vision model of transformers makes of images, as features on a grid.

There is no list of models: what one makes of two images says where its patches are and how it pools them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from w2s.teachers.base import Features, PatchNetwork

MOST_PREFIX_TOKENS = 16
"""Class tokens and registers before the patches: RADIO has ten, Pixio eight."""


class Parts(NamedTuple):
    """The parts of a transformers model that make features."""

    tower: nn.Module
    """From images to `last_hidden_state`, and to what it pools."""
    projection: nn.Module | None
    """What the pooled output goes through; None where pooling has no weights: classifiers are published without."""


class HuggingFaceFeatures(PatchNetwork):
    """Patch tokens, or the last map, of a transformers model."""

    def __init__(
        self, parts: Parts, *, image_size: int, patch: int, options: dict[str, Any], normalisation: dict[str, Any]
    ) -> None:
        """Wrap a model and look at what it makes of two images.

        Args:
            parts: the model.
            image_size: side of the input in pixels.
            patch: side of a patch in pixels, 0 if it is not known.
            options: further arguments of each call.
            normalisation: `image_mean` and `image_std`.

        Raises:
            ValueError: its features are not a square map.
        """
        layered = hasattr(getattr(parts.tower, "config", None), "num_hidden_layers")
        images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs = parts.tower(images, **options, **({"output_hidden_states": True} if layered else {}))
            tokens = _to_tokens(outputs.last_hidden_state)
            prefix, grid = _positions(tokens, image_size, patch)
            norm, head = _pooling(parts, outputs, tokens, prefix)
            features = _features(outputs, prefix, norm, head, parts.projection)
        hidden = (outputs.hidden_states or [])[1:] if layered else []
        depth = len(hidden) if all(after.shape[:2] == tokens.shape[:2] for after in hidden) else 0
        super().__init__(
            width=features.patches.shape[-1],
            summary_width=features.summary.shape[-1],
            grid=grid,
            image_size=image_size,
            mean=normalisation["image_mean"],
            std=normalisation["image_std"],
            depth=depth,
            layer_width=hidden[0].shape[-1] if depth else 0,
        )
        self.prefix, self.options = prefix, options
        self.tower, self.norm, self.head, self.projection = parts.tower, norm, head, parts.projection

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised images, row by row, without class tokens and registers."""
        outputs = self.tower(images, **self.options, **({"output_hidden_states": True} if layers else {}))
        features = _features(outputs, self.prefix, self.norm, self.head, self.projection)
        # The first hidden states are the embeddings.
        return features._replace(layers=tuple(outputs.hidden_states[1 + layer][:, self.prefix :] for layer in layers))


def _features(outputs: Any, prefix: int, norm: nn.Module, head: nn.Module, projection: nn.Module | None) -> Features:
    tokens = _to_tokens(outputs.last_hidden_state)
    patches = head(norm(tokens[:, prefix:]))
    pooled = _pooled(outputs)
    if pooled is not None and projection is not None:
        return Features(patches, projection(pooled))
    return Features(patches, tokens[:, 0] if prefix else patches.mean(1))


def _pooled(outputs: Any) -> Tensor | None:
    """One vector an image: RADIO's summary, all others' pooled output."""
    pooled = getattr(outputs, "summary", None)
    pooled = getattr(outputs, "pooler_output", None) if pooled is None else pooled
    return None if pooled is None else pooled.flatten(1)


def _to_tokens(hidden: Tensor) -> Tensor:
    """Hidden states as [n, places, width], from tokens or from a square map with its channels first or last."""
    if hidden.ndim == 3:
        return hidden
    return hidden.movedim(1 if hidden.shape[2] == hidden.shape[3] else 3, 1).flatten(2).transpose(1, 2)


def _positions(tokens: Tensor, image_size: int, patch: int) -> tuple[int, int]:
    """Tokens before the patches, and patches along one side, of what a model makes of two images.

    Raises:
        ValueError: they are not a square map of an image.
    """
    count, grid = tokens.shape[1], image_size // patch if patch else 0
    if grid and count >= grid**2:
        possible = [count - grid**2]
    else:
        # patches that were merged on the way, behind at most a class token
        possible = [prefix for prefix in (0, 1) if _is_map(count - prefix, image_size)]
    if len(tokens) != 2 or not possible or possible[0] > MOST_PREFIX_TOKENS:
        raise ValueError(f"it makes {count} tokens of {image_size} px, which are not a square map of patches")
    return possible[0], math.isqrt(count - possible[0])


def _is_map(positions: int, image_size: int) -> bool:
    """Whether places are as many as squares of an image can be."""
    side = math.isqrt(positions)
    return positions > 0 and side**2 == positions and image_size % side == 0


def _pooling(parts: Parts, outputs: Any, tokens: Tensor, prefix: int) -> tuple[nn.Module, nn.Module]:
    """The norm that comes only after pooling, and the projection that each token can go through.

    Both are found by what is pooled: the class token, or a mean of tokens, through that norm. Where it is anything
    else, of an attention pool or a tanh, tokens stay as they are.
    """
    pooled = _pooled(outputs)
    means = [tokens[:, prefix:].mean(1), *([tokens[:, 0], tokens[:, :prefix].mean(1)] if prefix else [])]
    if pooled is not None and parts.projection is not None and pooled.shape == means[0].shape:
        for norm in (nn.Identity(), *_norms(parts.tower, pooled.shape[1])):
            for mean in means:
                if torch.allclose(norm(mean), pooled, rtol=1e-3, atol=1e-3 * float(pooled.abs().max())):
                    return norm, parts.projection
    return nn.Identity(), nn.Identity()


def _norms(tower: nn.Module, width: int) -> Iterator[nn.Module]:
    """Norms of a tower outside of its layers, the last one first."""
    for name, module in reversed(list(tower.named_modules())):
        kind, weight = type(module).__name__.lower(), getattr(module, "weight", None)
        outside = name.count(".") < 2 and "norm" in kind and "batch" not in kind
        if outside and weight is not None and weight.shape == (width,):
            yield module
