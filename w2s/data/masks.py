"""Which patches are masked, and which ones patch dropout keeps."""

import math

import numpy as np
from numpy.typing import NDArray


def block_mask(
    rng: np.random.Generator, grid: int, masked: int, min_block: int, block_aspect: float
) -> NDArray[np.bool_]:
    """Draw a block-wise mask with exactly `masked` masked patches.

    Rectangles are laid over each other until enough patches are covered: their area is uniform between `min_block`
    and what is still missing, their aspect ratio log-uniform in [block_aspect, 1 / block_aspect] (BEiT, Bao et al.
    2021, algorithm 1). The last block gives up, from its end, the patches that are too many.

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
        block = _draw_block(rng, grid, min_block, max(min_block, missing), block_aspect)
        rows, columns = np.nonzero(~mask[block])
        rows, columns = rows[:missing], columns[:missing]
        mask[block][rows, columns] = True
        missing -= len(rows)
    return mask.ravel()


def _draw_block(
    rng: np.random.Generator, grid: int, min_area: int, max_area: int, block_aspect: float
) -> tuple[slice, slice]:
    area = rng.uniform(min_area, max_area)
    log_aspect = math.log(block_aspect)
    aspect = math.exp(rng.uniform(log_aspect, -log_aspect))
    height = min(grid, max(1, round(math.sqrt(area * aspect))))
    width = min(grid, max(1, round(math.sqrt(area / aspect))))
    top = int(rng.integers(grid - height + 1))
    left = int(rng.integers(grid - width + 1))
    return slice(top, top + height), slice(left, left + width)


def uniform_mask(rng: np.random.Generator, grid: int, masked: int) -> NDArray[np.bool_]:
    """Draw a mask whose masked patches are anywhere, each place equally likely: bool [grid * grid], row by row."""
    return rng.permutation(grid * grid) < masked


def kept_patches(rng: np.random.Generator, patches: int, kept: int) -> NDArray[np.int64]:
    """Draw `kept` of `patches` patches without replacement: int64 [kept], ascending."""
    return np.sort(rng.permutation(patches)[:kept])
