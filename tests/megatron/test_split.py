"""How layers are split over pipeline stages."""

import pytest

from tests.megatron.spawn import SHAPE
from w2s.config.sections import ParallelConfig
from w2s.megatron.split import balanced, pipeline_layout
from w2s.towers.vision import vision_stack


@pytest.mark.parametrize(
    ("layers", "stages", "first", "last", "expected"),
    [
        (4, 1, 0.5, 0.5, [4]),
        (4, 2, 0, 0, [2, 2]),
        (5, 2, 0.3, 0.1, [2, 3]),
        (5, 2, 0.1, 0.3, [3, 2]),
        (8, 4, 1.2, 0, [1, 2, 2, 3]),
        (48, 4, 3.0, 2.0, [11, 13, 13, 11]),
        (3, 3, 9, 9, [1, 1, 1]),
    ],
)
def test_the_busiest_stage_has_least_to_do(
    layers: int, stages: int, first: float, last: float, expected: list[int]
) -> None:
    split = balanced(layers, stages, first, last)
    assert sum(split) == layers
    work = [count + first * (n == 0) + last * (n == stages - 1) for n, count in enumerate(split)]
    wanted = [count + first * (n == 0) + last * (n == stages - 1) for n, count in enumerate(expected)]
    assert max(work) == pytest.approx(max(wanted))


def test_a_layout_in_megatrons_words() -> None:
    assert pipeline_layout([1, 2]) == [["embedding", "decoder"], ["decoder", "decoder", "loss"]]


def test_the_work_beside_the_layers_of_a_small_tower() -> None:
    """Products of a token: 3 x 8 x 8 x 32 of the patch embedding, beside those of a layer of width 32."""
    stack = vision_stack(SHAPE, head_width=24, split=ParallelConfig().vision_split)
    layer = 4 * 32 * 32 + 2 * 32 * 64 + 2 * 17 * 32
    assert stack.embedding_cost == pytest.approx(3 * 8 * 8 * 32 / layer)
    assert stack.head_cost == pytest.approx((32 + 32 * 24) / layer)
