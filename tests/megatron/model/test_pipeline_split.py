"""How layers are split over pipeline stages."""

from dataclasses import replace

import pytest

from tests.megatron.spawn import SHAPE
from w2s.config.sections import ParallelConfig, TextConfig
from w2s.megatron.model.pipeline_split import balanced, pipeline_layout, text_layers, vision_layers


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
    """Products of a token of width 32: 3 x 8 x 8 x 32 of the patch embedding are 0.66 of a layer's, the head 0.03."""
    two = ParallelConfig(pipeline=2)
    layer = 4 * 32 * 32 + 2 * 32 * 64 + 2 * 17 * 32
    first, last = 3 * 8 * 8 * 32 / layer, (32 + 32 * 24) / layer
    deep = replace(SHAPE, layers=9)
    assert vision_layers(deep, 24, two) == balanced(9, 2, first, last) == [4, 5]
    assert vision_layers(deep, 24, ParallelConfig(pipeline=2, vision_split=(7, 2))) == [7, 2]
    assert vision_layers(deep, 24, ParallelConfig()) == [9]


def test_the_text_tower_has_more_work_at_its_end() -> None:
    """An embedding is looked up; the head of a caption of 16 tokens is 0.05 of a layer's work on one of them."""
    text = TextConfig(layers=9, width=32, heads=2, mlp_width=64)
    assert text_layers(text, 128, ParallelConfig(pipeline=2)) == [5, 4]
