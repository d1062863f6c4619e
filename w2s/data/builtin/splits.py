"""Who sees what: names held out of training, and drawings held out for choosing settings."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from w2s.data.builtin.near_duplicates import near_duplicates_in
from w2s.data.builtin.write_shards import Pair

HELD_OUT_NAMES = 0.2
"""Fraction of the emoji names that training never sees."""
TUNING_PICTURES = 0.15
"""Fraction of the other training pictures that are held out, where their name has another picture."""
UNSEEN_PICTURES = 0.12
"""Fraction of pictures by one artist that are held out with their names."""


def is_held_out(name: str) -> bool:
    """Whether training must not see an emoji's name; depends on the name alone."""
    return _draw(f"name {name}") < HELD_OUT_NAMES


def allowed(emoji: Iterable[Pair], clipart: Iterable[Pair], names: Iterable[str], tests: Sequence[Pair]) -> list[Pair]:
    """Return what training and tuning may see, every picture once.

    Args:
        emoji: pictures that are called by the names of emoji; those with a name that is held out go.
        clipart: pictures with free captions; those go that have a name that is held out in their caption.
        names: all names of emoji.
        tests: test pictures; what is nearly one of them goes, whatever it is called.
    """
    held_out = [_words(name) for name in names if is_held_out(name)]
    kept = [pair for pair in emoji if not is_held_out(pair.name)]
    captions = {pair.name: _words(pair.name) for pair in clipart}
    kept += [pair for pair in clipart if not any(name in captions[pair.name] for name in held_out)]
    # Twemoji has one picture for families of several names.
    once = list({pair.png: pair for pair in reversed(kept)}.values())[::-1]
    return [pair for pair, tested in zip(once, near_duplicates_in(once, tests), strict=True) if not tested]


def split_tuning(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Part pictures into those to train on and those to choose settings on.

    A picture is held out only if another one with its name remains, and if none that remains is nearly the same.
    """
    left = Counter(pair.name for pair in pairs)
    held_out = []
    for pair in sorted(pairs, key=lambda pair: _draw(f"picture {pair.key}")):
        if _draw(f"picture {pair.key}") < TUNING_PICTURES and left[pair.name] > 1:
            left[pair.name] -= 1
            held_out.append(pair)
    return _part(pairs, held_out)


def split_unseen(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Part pictures, one a name, into those to train on and those to look at meanwhile, which have other names.

    A picture is held out only if none that remains is nearly the same.
    """
    return _part(pairs, [pair for pair in pairs if _draw(f"picture {pair.key}") < UNSEEN_PICTURES])


def _part(pairs: Sequence[Pair], held_out: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Those to train on, and those of `held_out` that are like none of the others."""
    keys = {pair.key for pair in held_out}
    known = near_duplicates_in(held_out, [pair for pair in pairs if pair.key not in keys])
    tuning = [pair for pair, seen in zip(held_out, known, strict=True) if not seen]
    keys = {pair.key for pair in tuning}
    return [pair for pair in pairs if pair.key not in keys], tuning


def _draw(text: str) -> float:
    """A number in [0, 1) that is always the same for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _words(text: str) -> str:
    """The words of a text in small letters, a space around each, so that a part of it is whole words."""
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])
