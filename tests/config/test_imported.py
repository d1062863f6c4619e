"""Code of the user's own, by its name."""

import math

import pytest

from w2s.config.imported import imported, imported_class
from w2s.config.load import load
from w2s.errors import ConfigError


class Base:
    """What a class has to be."""


class Sized(Base):
    """Is made with a size."""

    def __init__(self, size: int) -> None:
        self.size = size


def test_a_function_of_a_module() -> None:
    assert imported("mim.loss", "math:hypot") is math.hypot


def test_a_class_that_takes_what_it_is_given() -> None:
    assert imported_class("key", f"{__name__}:Sized", Base, ["size"]) is Sized
    with pytest.raises(ConfigError, match=r"^key: .*:Sized cannot be made without arguments .*'size'"):
        imported_class("key", f"{__name__}:Sized", Base)
    with pytest.raises(ConfigError, match=r"^key: math:hypot is not a subclass of .*test_imported.Base"):
        imported_class("key", "math:hypot", Base)


def test_a_loss_is_known_by_its_name_or_is_written_as_one_s_own() -> None:
    assert load("mim", ["mim.loss=my_losses:angle"]).mim.loss == "my_losses:angle"
    with pytest.raises(ConfigError, match=r"mim.loss=cosin must be one of cosine, .*: did you mean cosine\?"):
        load("mim", ["mim.loss=cosin"])
