"""Weights of another input or patch size."""

import math

from torch import Tensor


def resize_positions(positions: Tensor, patches: int, before: int) -> Tensor:
    """Interpolate position embeddings bicubically for another grid; those before the patches' stay.

    Args:
        positions: [1, before + old * old, width].
        patches: patches in an image of the new size, a square number.
        before: class tokens: 1 or 0.

    Returns:
        [1, before + patches, width] in the type of `positions`.
    """
    from timm.layers import resample_abs_pos_embed  # seconds, for what few runs need

    side = math.isqrt(patches)
    resized: Tensor = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=before, interpolation="bicubic")
    return resized.to(positions.dtype)


def resize_patch_kernel(kernel: Tensor, size: int) -> Tensor:
    """Resample the patch embedding's kernel for patches of another size.

    By the pseudo-inverse of the bicubic resize (Beyer et al. 2023, FlexiViT, section 3.4), which keeps the embedding
    of an enlarged image what it was. The released code resizes the kernel itself, which scales its output by the
    number of pixels.

    Args:
        kernel: [width, 3, old, old].
        size: side of the new patches in pixels.

    Returns:
        [width, 3, size, size] in the type of `kernel`.
    """
    from timm.layers import resample_patch_embed

    resized: Tensor = resample_patch_embed(kernel, [size, size], interpolation="bicubic")
    return resized.to(kernel.dtype)


def shorten_context(positions: Tensor, length: int) -> Tensor:
    """Keep the first `length` of a text tower's positions [old, width]: exact, as a token sees only those before it."""
    return positions[:length]
