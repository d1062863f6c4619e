"""The keys of the configuration: their types, in words that a user reads, and the nearest to a misspelt one."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from w2s.config.rules import NameOrImport
from w2s.config.sections import Config
from w2s.errors import ConfigError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def _leaves(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(section)
    for field in fields(section):
        hint = hints[field.name]
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _leaves(hint, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint


FIELDS: dict[str, Any] = dict(_leaves(Config, ""))
"""Type of every value by its full key, such as `train.steps`."""

SECTIONS: frozenset[str] = frozenset(
    ".".join(parts[:length]) for parts in (key.split(".") for key in FIELDS) for length in range(1, len(parts))
)
"""Full key of every section, such as `model.vision`."""

_REASONS = {
    ("precision.fp8", name): f"{name} needs Blackwell's tensor cores, Hopper has none: use tensorwise"
    for name in ("mxfp8", "nvfp4")
}
"""Why some values that users know from elsewhere are not taken."""


def is_text(key: str) -> bool:
    """Whether the value of a key is text, which is taken as it stands and not read as YAML."""
    hint = FIELDS.get(key)
    return hint is str or get_origin(hint) is Literal


def entry_section(key: str) -> type | None:
    """The dataclass of the entries of a key that takes a list of sections, such as `data.phases`; otherwise None."""
    entry = next(iter(get_args(FIELDS[key])), None) if get_origin(FIELDS[key]) is list else None
    return entry if isinstance(entry, type) and is_dataclass(entry) else None


def entry_hint(section: type, field: str) -> Any:
    """The type of a field of such a dataclass."""
    return get_type_hints(section)[field]


def choices(key: str) -> list[str]:
    """The words that a key takes, if it takes some words alone, or suggests some."""
    hint = FIELDS.get(key)
    if hint is bool:
        return ["true", "false"]
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    section, _, field = key.rpartition(".")
    rules = attrgetter(section)(Config()).rules[field] if section and key in FIELDS else []
    return [name for rule in rules if isinstance(rule, NameOrImport) for name in rule.names]


def expected(key: str) -> str:
    """What a key takes, in words."""
    return in_words(FIELDS[key])


def advice(key: str, value: object) -> str:
    """What to say of a value that a key does not take beside what it takes; empty where there is nothing to say."""
    if (key, str(value)) in _REASONS:
        return f": {_REASONS[key, str(value)]}"
    if get_origin(FIELDS[key]) is Literal:
        near = difflib.get_close_matches(str(value), map(str, get_args(FIELDS[key])), n=1)
        return f": did you mean {near[0]}?" if near else ""
    return ""


def in_words(hint: Any) -> str:
    """What a type takes, in words."""
    arguments = get_args(hint)
    match get_origin(hint):
        case origin if origin is Literal:
            return "one of " + ", ".join(map(str, arguments))
        case origin if origin in (UnionType, Union):
            return " or ".join(map(in_words, arguments))
        case origin if origin is tuple:
            return "a list of numbers" if ... in arguments else f"a list of {len(arguments)} numbers"
        case origin if origin is list and is_dataclass(arguments[0]):
            return f"a list of sections with keys such as {fields(arguments[0])[0].name}"
        case origin if origin is dict:
            return f"a mapping such as {{name: {_WORDS[arguments[1]]}}}"
        case origin if origin is list:
            return f"a list, each entry {in_words(arguments[0])}"
        case _:
            return _WORDS[hint]


def refuse_unknown(entry: Any, section: type, where: str) -> None:
    """Refuse a mapping with a key that a dataclass has not; anything else than a mapping is left to its reader.

    Raises:
        ConfigError: with the key and the one that may have been meant.
    """
    keys = [field.name for field in fields(section)]
    unknown = next((key for key in entry if key not in keys), None) if isinstance(entry, dict) else None
    if unknown is not None:
        raise ConfigError(f"{where}: unknown key {unknown}: did you mean {nearest(str(unknown), keys)}?")


def nearest(name: str, names: Iterable[str]) -> str:
    """The name most like a misspelt one.

    A name that ends alike counts as near too: `stepz` and `optimizer.lr` find `train.steps` and `optim.lr`.
    """
    candidates = list(names)
    last = name.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        end = difflib.SequenceMatcher(None, last, candidate.rpartition(".")[2]).ratio()
        return max(whole, (whole + 2 * end) / 3)

    return max(candidates, key=likeness)
