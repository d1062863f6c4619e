"""What the sections of the configuration require of their values, each in one line of error."""

from w2s.errors import ConfigError
from w2s.redaction import printable

LONGEST_NAME = 180
"""Bytes of the name of a folder."""


def require(condition: bool, message: str) -> None:
    """Refuse with `message` where `condition` does not hold."""
    if not condition:
        raise ConfigError(message)


def require_folder_name(name: str, key: str, fix: str) -> None:
    """Refuse what is not a name of a folder: with slashes or control characters, or too long."""
    require(
        name not in ("", ".", "..") and "/" not in name and name == printable(name),
        f"{key}={name} is not a folder name: {fix}",
    )
    # File systems take 255 bytes; a number and an ending may come to it.
    require(len(name.encode()) <= LONGEST_NAME, f"{key}={name[:40]}... is longer than {LONGEST_NAME} bytes: shorten it")


def require_positive(section: object, prefix: str, names: tuple[str, ...]) -> None:
    """Refuse a number of a section below 1."""
    for name in names:
        value = getattr(section, name)
        require(value >= 1, f"{prefix}.{name}={value} must be at least 1")


def require_scale(scale: tuple[float, float], key: str) -> None:
    """Refuse what is not a range of fractions."""
    low, high = scale
    require(0 < low <= high <= 1, f"{key}=[{low}, {high}] must be two rising numbers in (0, 1]")


def require_probabilities(weights: list[float], key: str) -> None:
    """Refuse weights that do not sum to 1; none at all are allowed."""
    total = sum(weights)
    if weights and (min(weights) <= 0 or abs(total - 1) > 1e-3):
        fix = [round(weight / total, 4) for weight in weights] if min(weights) > 0 else "only numbers above 0"
        raise ConfigError(f"{key}={weights} are not probabilities that sum to 1: use {fix}")
