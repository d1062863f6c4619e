"""Rules of the configuration that are data: they stand beside a field's type, and are worded here.

    lr: PositiveFloat = 1e-3
    cooldown: Annotated[Fraction, UselessWith("optim.schedule", "cosine")] = 0.2

A section refuses a value out of range when it is made. What depends on other keys or on the stage is for `check_rules`,
which is called for the sections that a stage reads.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from w2s.errors import ConfigError
from w2s.redaction import printable

LONGEST_NAME = 180
"""Bytes of the name of a folder."""


def require(condition: bool, message: str) -> None:
    """Refuse with `message` where `condition` does not hold."""
    if not condition:
        raise ConfigError(message)


def is_name(text: str) -> bool:
    """Whether a text is letters, digits, `_` and `-`, and so fit for names of metrics and files."""
    return re.fullmatch(r"[\w-]+", text, re.ASCII) is not None


def written(value: Any) -> str:
    """A value as a user writes it, a long one shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def listed(values: Sequence[object]) -> str:
    """Values as a sentence has them: `1, 2 or 4`."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


class Rule:
    """What is asked of the value of a field."""

    def complaint(self, value: Any) -> str:
        """What is wrong with a value, as it stands behind `key=value`; empty if nothing is."""
        return ""

    def conflict(self, config: Any) -> str:
        """What is wrong with another value than the default in a configuration; empty if nothing is."""
        return ""


@dataclass(frozen=True)
class Range(Rule):
    """Numbers of an interval such as `[1, inf)` or `(0, 1]`, also all those of a list; null is always allowed."""

    interval: str

    def complaint(self, value: Any) -> str:
        """What is wrong with a number, or with one of a list."""
        several = isinstance(value, list | tuple)
        numbers = value if several else [value]
        if all(number in self for number in numbers):
            return ""
        finite = " and finite" if self.interval.endswith("inf)") and math.inf in numbers else ""
        return f"must {'each ' * several}be {self._words()}{finite}"

    def __contains__(self, number: float) -> bool:
        low, high = self._bounds
        above = number >= low if self.interval.startswith("[") else number > low
        return above and (number <= high if self.interval.endswith("]") else number < high)

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        low, high = self.interval[1:-1].split(", ")
        return float(low), float(high)

    def _words(self) -> str:
        low, _, high = self.interval[1:-1].partition(", ")
        if high == "inf":
            return f"{'at least' if self.interval.startswith('[') else 'above'} {low}"
        return f"in {self.interval}"


@dataclass(frozen=True)
class Rising(Range):
    """Two numbers of an interval, the second not below the first."""

    def complaint(self, value: Any) -> str:
        """What is wrong with the two."""
        low, high = value
        if low in self and high in self and low <= high:
            return ""
        return f"must be two rising numbers {self._words()}"


@dataclass(frozen=True)
class Probabilities(Rule):
    """Numbers above 0 that sum to 1, or none."""

    def complaint(self, value: Any) -> str:
        """What is wrong with the numbers, and what they may have been meant to be."""
        total = sum(value)
        if not value or (min(value) > 0 and abs(total - 1) <= 1e-3):
            return ""
        fix = [round(weight / total, 4) for weight in value] if min(value) > 0 else "only numbers above 0"
        return f"are not probabilities that sum to 1: use {fix}"


@dataclass(frozen=True)
class FolderName(Rule):
    """The name of a folder: one part of a path, without control characters and not too long."""

    fix: str
    """What to do about another one."""
    optional: bool = False
    """Whether it may be empty."""

    def complaint(self, value: Any) -> str:
        """What is wrong with the name."""
        if value in (".", "..") or not (value or self.optional) or "/" in value or value != printable(value):
            return f"is not a folder name: {self.fix}"
        # File systems take 255 bytes; a number and an ending may come to it.
        too_long = len(value.encode()) > LONGEST_NAME
        return f"is longer than {LONGEST_NAME} bytes: shorten it" if too_long else ""


class NameOrImport(Rule):
    """One of some names, or code of the user's own, written `module:attribute` (`imported.py`)."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def complaint(self, value: Any) -> str:
        """What it must be, with the name that is most like it."""
        if value in self.names or ":" in value:
            return ""
        near = difflib.get_close_matches(value, self.names, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        return f"must be one of {', '.join(self.names)} or module:function{hint}"


class UselessWith(Rule):
    """Another value than the default does nothing where `key` has one of `values`."""

    def __init__(self, key: str, *values: Any) -> None:
        self.key, self.values = key, values

    def conflict(self, config: Any) -> str:
        """That it does nothing, with the values of `key` that would give it something to do."""
        value = attrgetter(self.key)(config)
        if value not in self.values:
            return ""
        section, _, name = self.key.rpartition(".")
        hint = get_type_hints(type(attrgetter(section)(config)))[name]
        choices = (True, False) if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
        useful = [written(choice) for choice in choices if choice not in self.values]
        other = f"use {self.key}={listed(useful)}" if useful else f"set {self.key}"
        return f"does nothing with {self.key}={written(value)}: leave it out, or {other}"


class OnlyFor(Rule):
    """Another value than the default is for `stages` alone, and why."""

    def __init__(self, *stages: str, why: str) -> None:
        self.stages, self.why = stages, why

    def conflict(self, config: Any) -> str:
        """That it is not for the stage, and for which it is."""
        if config.stage in self.stages:
            return ""
        return f"is not for stage {config.stage}: {self.why}, give it to {listed(self.stages)} alone"


PositiveInt = Annotated[int, Range("[1, inf)")]
NonNegativeInt = Annotated[int, Range("[0, inf)")]
PositiveFloat = Annotated[float, Range("(0, inf)")]
NonNegativeFloat = Annotated[float, Range("[0, inf)")]
Fraction = Annotated[float, Range("[0, 1]")]
PositiveFraction = Annotated[float, Range("(0, 1]")]
FractionBelowOne = Annotated[float, Range("[0, 1)")]


def _metadata(hint: Any) -> Iterator[Any]:
    yield from getattr(hint, "__metadata__", ())
    for argument in get_args(hint):
        yield from _metadata(argument)


class Section:
    """A section of the configuration, which is never made with a value out of range."""

    prefix: ClassVar[str]
    """What stands before its keys in messages; in braces are fields of it."""
    rules: ClassVar[dict[str, list[Rule]]]
    """What its fields declare, by field."""

    def __init_subclass__(cls, prefix: str) -> None:
        hints = get_type_hints(cls, include_extras=True)
        cls.prefix, cls.rules = prefix, {name: list(_metadata(hint)) for name, hint in hints.items()}

    def __post_init__(self) -> None:
        """Refuse what breaks the rules of a field.

        Raises:
            ConfigError: with the key, its value and what it must be.
        """
        for name, rules in self.rules.items():
            value = getattr(self, name)
            for rule in rules if value is not None else ():
                if complaint := rule.complaint(value):
                    raise ConfigError(f"{self.prefix.format_map(vars(self))}{name}={written(value)} {complaint}")


def check_rules(config: Any, *sections: str) -> None:
    """Refuse what would do nothing beside other keys, or in the stage of a configuration.

    Args:
        config: the whole configuration.
        sections: full keys of the sections that the stage reads.

    Raises:
        ConfigError: with the key, its value and the fix.
    """
    for key in sections:
        section = attrgetter(key)(config)
        for field in fields(section):
            value = getattr(section, field.name)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            for rule in section.rules[field.name] if value != default else ():
                if conflict := rule.conflict(config):
                    raise ConfigError(f"{key}.{field.name}={written(value)} {conflict}")
