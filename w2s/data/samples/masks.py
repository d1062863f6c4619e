"""Block-wise masks: which patches of an image are hidden."""

import math

import numpy as np
from numpy.typing import NDArray

_TRIES = 100
"""Blocks that are drawn before one that brings too many patches is trimmed (EVA ends its mask after 10)."""


def block_mask(
    rng: np.random.Generator, grid: int, masked: int, min_block: int, block_aspect: float
) -> NDArray[np.bool_]:
    """Draw a block-wise mask with exactly `masked` masked patches.

    Rectangles are laid over each other until enough patches are covered: their area is uniform between `min_block`
    and what is still missing, their aspect ratio log-uniform in [block_aspect, 1 / block_aspect] (BEiT, Bao et al.
    2021, algorithm 1). One that spans the grid, or that brings no new patch or too many, is drawn again
    (baaivision/EVA, EVA-01/eva/masking_generator.py).

    Returns:
        bool [grid * grid], row by row.

    Raises:
        ValueError: more patches to mask than there are.
    """
    if masked > grid * grid:
        raise ValueError(f"cannot mask {masked} of {grid * grid} patches")
    mask = np.zeros((grid, grid), dtype=np.bool_)
    missing = masked
    while missing > 0:
        block = _next_block(rng, mask, missing, min_block, block_aspect)
        rows, columns = np.nonzero(~block)
        block[rows[:missing], columns[:missing]] = True
        missing -= min(missing, len(rows))
    return mask.ravel()


def _next_block(
    rng: np.random.Generator, mask: NDArray[np.bool_], missing: int, min_block: int, block_aspect: float
) -> NDArray[np.bool_]:
    """A view of the part of a mask that is covered next, with at most `missing` new patches.

    Where no such block is found, it is any block, turned at random so that what is too many goes from any corner.
    """
    grid = len(mask)
    for _ in range(_TRIES):
        height, width = _draw_size(rng, min_block, missing, block_aspect)
        if max(height, width) < grid:
            block = _place(rng, mask, height, width)
            if 0 < block.size - np.count_nonzero(block) <= missing:
                return block
    most = max(1, grid - 1)
    return np.rot90(_place(rng, mask, min(height, most), min(width, most)), int(rng.integers(4)))


def _draw_size(rng: np.random.Generator, min_block: int, missing: int, block_aspect: float) -> tuple[int, int]:
    area = min_block + (missing - min_block) * rng.random()  # also between the two where less is missing
    aspect = block_aspect ** (1 - 2 * rng.random())
    return max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))


def _place(rng: np.random.Generator, mask: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    top = int(rng.random() * (len(mask) - height + 1))
    left = int(rng.random() * (len(mask) - width + 1))
    return mask[top : top + height, left : left + width]
