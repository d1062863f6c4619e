"""The caption of a sample: from a text file or a key of its JSON file, one of several drawn by weight."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from w2s.data.shards.raw_sample import BadSample, RawSample, caption_file

NO_CAPTION = "caption is missing"
"""Why a sample is bad that has none."""


def draw_caption(raw: RawSample, caption_key: str, weights: Sequence[float], rng: np.random.Generator) -> str:
    """Return one caption of a sample, without white space around it.

    Args:
        raw: the sample.
        caption_key: extensions or `json.KEY`, separated by `;`.
        weights: probability of each of these; where a sample lacks some, the others share theirs. Empty takes the
            first that is there.
        rng: draws the caption.

    Raises:
        BadSample: all captions are missing or empty, or the chosen one cannot be read.
    """
    keys = caption_key.split(";")
    present = [index for index, key in enumerate(keys) if raw.files.get(caption_file(key))]
    if weights and len(present) > 1:
        shares = np.array([weights[index] for index in present])
        order = rng.choice(present, size=len(present), replace=False, p=shares / shares.sum()).tolist()
    else:
        order = present
    for index in order:
        caption = read_caption(raw, keys[index], rng)
        if caption:
            return caption
    raise BadSample(NO_CAPTION)


def read_caption(raw: RawSample, key: str, rng: np.random.Generator) -> str:
    """Return the caption under one key, one of them where there is a list; empty where there is none.

    Raises:
        BadSample: not UTF-8, not JSON, or the JSON has something else there.
    """
    try:
        text = raw.files[caption_file(key)].decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("caption is not UTF-8") from error
    if caption_file(key) == key:
        return text.strip()
    value = _json_value(text, key.removeprefix("json."))
    if isinstance(value, list) and value:
        value = value[rng.integers(len(value))]
    if not isinstance(value, str | None):
        raise BadSample("caption is not text")
    # A JSON escape can name half of a character, which no tokenizer takes.
    return (value or "").encode("utf-8", "ignore").decode("utf-8").strip()


def _json_value(text: str, key: str) -> object:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("caption file is not JSON") from error
    return document.get(key) if isinstance(document, dict) else None


def caption_hash(caption: str) -> int:
    """Return 63 bits that are equal for equal captions, in every process."""
    digest = hashlib.blake2b(caption.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
