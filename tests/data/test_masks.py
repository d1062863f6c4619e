import numpy as np
import pytest

from w2s.data.counter import Purpose, generator
from w2s.data.masks import block_mask, kept_patches


def draw(seed: int, grid: int, masked: int, min_block: int) -> np.ndarray:
    return block_mask(generator(0, Purpose.MASK, seed), grid, masked, min_block, 0.3)


@pytest.mark.parametrize(
    ("grid", "masked", "min_block"),
    [(4, 6, 2), (4, 1, 2), (4, 0, 2), (4, 16, 2), (16, 105, 16), (16, 3, 16), (16, 256, 16), (2, 3, 9)],
)
def test_exactly_the_wanted_number_is_masked(grid: int, masked: int, min_block: int) -> None:
    counts = {int(draw(seed, grid, masked, min_block).sum()) for seed in range(300)}
    assert counts == {masked}


def neighbours_masked(mask: np.ndarray, grid: int) -> float:
    """Mean fraction of a masked patch's right and lower neighbours that are masked too."""
    square = mask.reshape(grid, grid)
    right = (square[:, 1:] & square[:, :-1]).sum() / square[:, :-1].sum()
    down = (square[1:] & square[:-1]).sum() / square[:-1].sum()
    return float(right + down) / 2


def test_masks_come_in_blocks() -> None:
    blocks = np.mean([neighbours_masked(draw(seed, 16, 105, 16), 16) for seed in range(100)])
    rng = np.random.default_rng(0)
    scattered = np.mean([neighbours_masked(rng.permutation(np.arange(256) < 105), 16) for _ in range(100)])
    assert scattered == pytest.approx(0.41, abs=0.02)
    assert blocks > 0.75


def test_a_single_block_is_a_rectangle() -> None:
    """With the whole mask in one block, at least the first rows are full; only the last may be cut."""
    seen = 0
    for seed in range(200):
        rows = draw(seed, 4, 6, 6).reshape(4, 4)
        widths = [row.sum() for row in rows if row.any()]
        seen += widths[:-1] == [widths[0]] * (len(widths) - 1) and widths[-1] <= widths[0]
    assert seen > 150


def test_every_patch_is_masked_at_times() -> None:
    share = np.mean([draw(seed, 4, 6, 2) for seed in range(2000)], axis=0)
    assert share.mean() == pytest.approx(6 / 16)
    assert share.min() > 0.2
    assert share.max() < 0.6


def test_masks_depend_on_the_index_alone() -> None:
    assert np.array_equal(draw(5, 16, 105, 16), draw(5, 16, 105, 16))
    assert len({draw(seed, 16, 105, 16).tobytes() for seed in range(100)}) == 100


def test_too_many_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot mask 17 of 16"):
        draw(0, 4, 17, 2)


def test_kept_patches_are_distinct_ascending_and_uniform() -> None:
    draws = np.stack([kept_patches(generator(0, Purpose.PATCHES, index), 16, 8) for index in range(2000)])
    assert draws.dtype == np.int64
    assert (np.diff(draws, axis=1) > 0).all()
    assert np.bincount(draws.ravel(), minlength=16) / 2000 == pytest.approx(np.full(16, 0.5), abs=0.05)
