import json
from collections import Counter

import numpy as np
import pytest

from w2s.data.samples.captions import draw_caption
from w2s.data.shards.raw_sample import BadSample, RawSample


def draw(files: dict[str, bytes], key: str, weights: tuple[float, ...] = (), seed: int = 0) -> str:
    return draw_caption(RawSample("k", "s", files), key, weights, np.random.default_rng(seed))


def metadata(**values: object) -> bytes:
    return json.dumps(values).encode()


def test_a_text_file_a_json_key_or_the_first_that_is_there() -> None:
    files = {"txt": b" from text\n", "json": metadata(caption="from json", other="x")}
    assert draw(files, "txt") == "from text"
    assert draw(files, "json.caption") == "from json"
    assert draw(files, "json.none;txt") == "from text"
    assert draw(files, "alt;json.other;txt") == "x"


def test_captions_are_drawn_by_weight() -> None:
    files = {"txt": b"a", "json": metadata(b="b", c=["c0", "c1"])}
    drawn = Counter(draw(files, "txt;json.b;json.c", (0.5, 0.3, 0.2), seed) for seed in range(4000))
    # Standard deviation of 4,000 draws: 32, 29, 19, 19.
    expected = {"a": 2000, "b": 1200, "c0": 400, "c1": 400}
    assert all(abs(drawn[name] - count) < 130 for name, count in expected.items())
    assert sum(drawn.values()) == 4000


def test_the_others_share_the_weight_of_a_missing_caption() -> None:
    files = {"json": metadata(b="b", c="c")}
    drawn = Counter(draw(files, "txt;json.b;json.c", (0.5, 0.25, 0.25), seed) for seed in range(1000))
    assert abs(drawn["b"] - 500) < 80
    assert drawn["b"] + drawn["c"] == 1000
    assert {draw({"json": metadata(c="c")}, "json.b;json.c", (0.9, 0.1), seed) for seed in range(20)} == {"c"}


@pytest.mark.parametrize(
    ("files", "key", "reason"),
    [
        ({}, "txt;json.a", "caption is missing"),
        ({"json": metadata(a=None)}, "json.a", "caption is missing"),
        ({"json": metadata(a=[])}, "json.a", "caption is not text"),
        ({"json": metadata(a=3)}, "json.a", "caption is not text"),
        ({"json": b"[1]"}, "json.a", "caption is missing"),
        ({"json": b"{"}, "json.a", "caption file is not JSON"),
        ({"json": b"[" * 100_000}, "json.a", "caption file is not JSON"),
        ({"json": b"\xff"}, "json.a", "caption is not UTF-8"),
    ],
)
def test_what_is_no_caption_has_a_reason(files: dict[str, bytes], key: str, reason: str) -> None:
    with pytest.raises(BadSample, match=f"^{reason}$"):
        draw(files, key)


def test_half_a_character_is_left_out() -> None:
    assert draw({"json": b'{"a": "x\\ud83d y"}'}, "json.a") == "x y"
