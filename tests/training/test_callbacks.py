"""Callbacks by their names."""

import pytest

from w2s.errors import ConfigError
from w2s.training.callbacks import Callback, load_callbacks


class Quiet(Callback):
    """Overrides nothing."""


class Demanding(Callback):
    """Cannot be made by its name alone."""

    def __init__(self, every: int) -> None:
        self.every = every


class Apart:
    """Is not a callback."""


def test_a_class_of_a_module() -> None:
    (callback,) = load_callbacks([f"{__name__}:Quiet"])
    assert isinstance(callback, Quiet)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.training.test_callbacks", "tests.training.test_callbacks is not written module:attribute"),
        ("no.such.module:Class", r"no.such.module:Class cannot be imported \(No module named 'no'\).*PYTHONPATH"),
        (f"{__name__}:Missing", "cannot be imported .*no attribute 'Missing'"),
        (f"{__name__}:Apart", "is not a subclass of w2s.training.callbacks.Callback"),
        (f"{__name__}:Demanding", "cannot be made without arguments .*'every'.*: give the others defaults"),
    ],
)
def test_what_is_not_a_callback_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.callbacks: .*{message}"):
        load_callbacks([name])
