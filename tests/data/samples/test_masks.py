import math

import numpy as np
import pytest
from scipy import ndimage

from w2s.data.samples import masks as masks_module
from w2s.data.samples.masks import block_mask
from w2s.data.samples.random_numbers import Purpose, generator


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
    """Where one block brings all patches at once, it is 2 x 3 or 3 x 2: a longer one would span the grid."""
    sizes = []
    for seed in range(200):
        square = draw(seed, 4, 6, 6).reshape(4, 4)
        sizes.append((int(square.any(1).sum()), int(square.any(0).sum())))
    single = [size for size in sizes if math.prod(size) == 6]
    assert set(single) == {(2, 3), (3, 2)}
    assert len(single) > 50


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


def ragged_mask(rng: np.random.Generator) -> np.ndarray:
    """EVA's mask of at most 105 of 16 x 16 patches, which ends early where 10 blocks in turn do not fit: bool [16, 16].

    Written from the description of EVA-01/eva/masking_generator.py (baaivision/EVA).
    """
    mask = np.zeros((16, 16), dtype=np.bool_)
    tries = 10
    while tries and mask.sum() < 105:
        tries -= 1
        missing = 105 - int(mask.sum())
        area, log_aspect = 16 + (missing - 16) * rng.random(), rng.uniform(math.log(0.3), -math.log(0.3))
        height, width = round(math.sqrt(area * math.exp(log_aspect))), round(math.sqrt(area / math.exp(log_aspect)))
        if height >= 16 or width >= 16:
            continue
        top, left = rng.integers(17 - height), rng.integers(17 - width)
        block = mask[top : top + height, left : left + width]
        if 0 < (~block).sum() <= missing:
            block[:] = True
            tries = 10
    return mask


def regions(masks: np.ndarray) -> np.ndarray:
    """Number of connected regions of each mask."""
    cross = np.zeros((3, 3, 3), dtype=bool)
    cross[1, 1, :] = cross[1, :, 1] = True  # masks do not touch each other
    labels, count = ndimage.label(masks, cross)
    owners = np.zeros(count + 1, dtype=int)
    owners[labels] = np.arange(len(masks)).reshape(-1, 1, 1)
    return np.bincount(owners[1:], minlength=len(masks))


def neighbours(masks: np.ndarray) -> float:
    """Masked neighbours of a masked patch, on average."""
    pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    return float(2 * pairs / masks.sum())


def test_places_and_shapes_are_evas() -> None:
    """10,000 masks of 105 of 256 patches; bounds are four standard errors where nothing else is said."""
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask(rng, 16, 105, 16, 0.3).reshape(16, 16) for _ in range(10_000)])
    for lines in (masks.mean(2), masks.mean(1)):  # share that is masked of every row, of every column
        between_ends = lines[:, 0] - lines[:, -1]
        assert abs(between_ends.mean()) < 4 * between_ends.std() / 100

    ragged = np.stack([ragged_mask(rng) for _ in range(10_000)])
    exact = ragged[ragged.sum((1, 2)) == 105]
    assert len(exact) / 10_000 == pytest.approx(0.65, abs=0.02)  # as the released generator was counted
    error = math.hypot(1 / 100, 1 / math.sqrt(len(exact)))
    for measure in (regions, full_lines):
        ours, theirs = measure(masks), measure(exact)
        assert ours.mean() == pytest.approx(theirs.mean(), abs=4 * error * theirs.std()), measure.__name__
    assert regions(masks).mean() == pytest.approx(regions(ragged).mean(), rel=0.06)  # those end before the last bits
    assert neighbours(masks) == pytest.approx(neighbours(exact), rel=0.005)
    share = masks.mean(0)
    assert share == pytest.approx(exact.mean(0), abs=5 * error * 0.5)  # of 256 places; 0.5 bounds the deviation


def full_lines(masks: np.ndarray) -> np.ndarray:
    """Whether a mask has a full row or column."""
    return masks.all(1).any(1) | masks.all(2).any(1)


@pytest.mark.parametrize(("grid", "masked", "min_block"), [(16, 105, 16), (4, 6, 2), (2, 1, 9)])
def test_no_block_spans_the_grid(monkeypatch: pytest.MonkeyPatch, grid: int, masked: int, min_block: int) -> None:
    sizes = []
    place = masks_module._place

    def note(rng: np.random.Generator, mask: np.ndarray, height: int, width: int) -> np.ndarray:
        sizes.append((height, width))
        return place(rng, mask, height, width)

    monkeypatch.setattr(masks_module, "_place", note)
    for seed in range(1000):
        draw(seed, grid, masked, min_block)
    assert np.max(sizes) == grid - 1


def test_what_is_too_many_is_trimmed_at_any_corner() -> None:
    """A block of 3 x 3 that gives up one patch of its nine loses each of its corners as often."""
    lost = np.zeros((3, 3))
    for seed in range(400):
        square = draw(seed, 4, 8, 10**6).reshape(4, 4)  # every block is too large and becomes 3 x 3
        rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
        lost += ~square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    corners = lost[::2, ::2]
    assert corners.sum() == lost.sum() == 400
    assert corners.min() > 60
