"""Which names and pictures training sees."""

from collections import Counter

import numpy as np
from PIL import Image

from w2s.data.builtin.drawings import png
from w2s.data.builtin.splits import TUNING_PICTURES, UNSEEN_PICTURES, allowed, is_held_out, split_tuning, split_unseen
from w2s.data.builtin.write_shards import Pair

HELD_OUT, SEEN = "banana", "kangaroo"


def pair(key: str, name: str, look: str = "") -> Pair:
    """Noise that differs for every look, which is the key if not given."""
    noise = np.random.default_rng(list((look or key).encode())).integers(0, 255, (16, 16, 3), np.uint8)
    return Pair(key, name, png(Image.fromarray(noise)))


def test_whether_a_name_is_held_out_depends_on_nothing_else() -> None:
    names = [f"name {index}" for index in range(2000)]
    # Three standard deviations of a fraction of 2,000 are 0.027.
    assert abs(np.mean([is_held_out(name) for name in names]) - 0.2) < 0.027
    # As long as these stand, data sets that were built before are comparable.
    assert [name for name in ("kangaroo", "banana", "robot", "cat", "tiger", "zebra") if is_held_out(name)] == [
        "banana",
        "cat",
        "tiger",
    ]


def test_held_out_names_are_nowhere() -> None:
    emoji = [pair("a", SEEN), pair("b", HELD_OUT), pair("c", SEEN)]
    clipart = [
        pair("d", f"old {HELD_OUT}, tool"),
        pair("e", f"{HELD_OUT.title()}"),
        pair("f", f"{HELD_OUT}-like"),
        pair("g", f"{HELD_OUT}es"),
        pair("h", f"{SEEN}, animal"),
    ]
    kept = allowed(emoji, clipart, [SEEN, HELD_OUT], [])
    assert [each.key for each in kept] == ["a", "c", "g", "h"]


def test_no_picture_is_a_test_picture_or_there_twice() -> None:
    emoji = [pair("a", SEEN), pair("b", "family", look="a"), pair("c", SEEN)]
    kept = allowed(emoji, [pair("d", "thing")], [SEEN], [pair("test", HELD_OUT, look="c")])
    assert [each.key for each in kept] == ["a", "d"]


def test_pictures_are_put_aside_whose_name_remains() -> None:
    pairs = [pair(f"{name}-{artist}", f"name {name}") for name in range(200) for artist in range(3)]
    pairs += [pair(f"single-{name}", f"single {name}") for name in range(200)]
    train, tune = split_tuning(pairs)
    assert sorted(each.key for each in train + tune) == sorted(each.key for each in pairs)
    assert {each.name for each in tune} <= {each.name for each in train}
    assert not any(each.name.startswith("single") for each in tune)
    # Three standard deviations of a fraction of 600 are 0.044.
    assert abs(len(tune) / 600 - TUNING_PICTURES) < 0.044
    assert split_tuning(pairs[::-1])[1] == tune


def test_a_picture_that_training_knows_is_not_put_aside() -> None:
    pairs = [pair(f"{name}-{artist}", f"name {name}", look=f"{name}") for name in range(60) for artist in range(2)]
    train, tune = split_tuning(pairs)
    assert (len(train), tune) == (120, [])
    assert set(Counter(each.name for each in train).values()) == {2}


def test_pictures_are_put_aside_with_their_names_unless_one_like_them_remains() -> None:
    pairs = [pair(f"picture-{index}", f"name {index}") for index in range(1000)]
    train, tune = split_unseen(pairs)
    assert sorted(each.key for each in train + tune) == sorted(each.key for each in pairs)
    # Three standard deviations of a fraction of 1,000 are 0.031.
    assert abs(len(tune) / 1000 - UNSEEN_PICTURES) < 0.031
    twin = Pair("twin", "another name", tune[0].png)
    assert split_unseen([twin])[0] == [twin]
    assert split_unseen([*pairs, twin])[1] == tune[1:]
