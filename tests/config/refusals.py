"""What the checks say of a configuration."""

import pytest

from w2s.config.checks import check
from w2s.config.load import load
from w2s.errors import ConfigError


def refusal(stage: str, *overrides: str, ranks: int = 1) -> str:
    """The one line in which a configuration is refused on so many ranks of one machine."""
    with pytest.raises(ConfigError) as caught:
        check(load(stage, overrides), ranks, ranks)
    message = str(caught.value)
    assert "\n" not in message
    return message


def accepts(stage: str, *overrides: str, ranks: int = 1) -> bool:
    """Whether a configuration passes; what is refused are its neighbours."""
    try:
        check(load(stage, overrides), ranks, ranks)
    except ConfigError:
        return False
    return True
