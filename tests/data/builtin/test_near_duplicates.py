"""The same drawing in another place, and drawings that only share their colours."""

from PIL import Image, ImageDraw

from w2s.data.builtin.drawings import png
from w2s.data.builtin.near_duplicates import near_duplicates_in
from w2s.data.builtin.write_shards import Pair


def house(canvas: int, side: int, left: int, top: int, roof: str = "red", width: int | None = None) -> Pair:
    """A house of a given side on a white canvas."""
    image = Image.new("RGB", (canvas, canvas), "white")
    draw = ImageDraw.Draw(image)
    right, middle, bottom = left + (width or side), top + side // 2, top + side
    draw.rectangle((left, middle, right, bottom), fill="blue")
    draw.polygon([(left, middle), (right, middle), ((left + right) // 2, top)], fill=roof)
    return Pair(f"{canvas}-{side}-{left}", "house", png(image))


def test_a_drawing_at_another_size_and_place_is_the_same() -> None:
    known = [house(128, 120, 4, 4)]
    assert near_duplicates_in([house(128, 60, 50, 8), house(78, 70, 4, 4)], known).tolist() == [True, True]


def test_other_colours_and_other_shapes_are_not() -> None:
    known = [house(128, 120, 4, 4)]
    wide = house(128, 60, 4, 30, width=120)
    assert near_duplicates_in([house(128, 120, 4, 4, roof="green"), wide], known).tolist() == [False, False]


def test_more_than_a_block_of_rows_and_nothing_to_compare_with() -> None:
    same, other = house(64, 50, 5, 5), house(64, 50, 5, 5, roof="green")
    assert near_duplicates_in([other] * 600 + [same], [house(128, 120, 4, 4)]).tolist() == [False] * 600 + [True]
    assert near_duplicates_in([same], []).tolist() == [False]
    assert near_duplicates_in([], [same]).tolist() == []
