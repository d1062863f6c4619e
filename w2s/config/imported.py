"""Code of your own that the configuration names: `module:attribute`."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from w2s.errors import ConfigError


def imported(key: str, name: str) -> Any:
    """Return what `name`, written `module:attribute`, stands for.

    Args:
        key: the configuration key that names it, for the message.
        name: of a module that is installed, or lies in a folder of `PYTHONPATH`, and of something in it.

    Raises:
        ConfigError: it is not written so, or cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{key}: {name} is not written module:attribute")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key}: {name} cannot be imported ({error}): install its module, or put its folder in PYTHONPATH"
        ) from error


def imported_class(key: str, name: str, base: type, arguments: Sequence[str] = ()) -> Any:
    """Return a class of your own that `imported` finds.

    Args:
        key: the configuration key that names it, for the message.
        name: written `module:Class`.
        base: what it has to be a subclass of.
        arguments: names of the arguments that it is made with.

    Raises:
        ConfigError: also if it is another class, or cannot be made with these arguments.
    """
    found = imported(key, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{key}: {name} is not a subclass of {base.__module__}.{base.__name__}")
    try:
        inspect.signature(found).bind(**dict.fromkeys(arguments))
    except TypeError as error:
        given = f"with {', '.join(arguments)} alone" if arguments else "without arguments"
        raise ConfigError(f"{key}: {name} cannot be made {given} ({error}): give the others defaults") from error
    return found
