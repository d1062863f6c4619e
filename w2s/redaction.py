"""What must not be seen: credentials in anything that is written, control characters in anything that is shown.

Credentials are the password of a URL, its signed parameters, and the values of environment variables: those whose name
says so (`..._TOKEN`), and those that a configuration takes by `${oc.env:NAME}`. In a text, `${oc.env:NAME}` stands in
the place of a value, so that a configuration that was written can be used again.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

HIDDEN = "W2S_HIDDEN"
"""Environment variable that lists the variables which configurations take, so that ranks know them too."""
SIGNED = "?***"
"""Stands for the query of a signed URL."""

_TAKEN = re.compile(r"\$\{oc\.env:\s*(\w+)")
_WRITTEN = re.compile(r"\$\{oc\.env:(\w+)\}")
_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):(?!\d+/)[^\s\"']*@")
"""A slash may be part of a password, but what follows a port is a path."""
_LOGIN = re.compile(r"(https?://)[^/@:\s]+@")
_QUERY = r"(?:(?!::)[^\s\"'#,;])*"
_SIGNED = re.compile(rf"\?(?=(?:{_QUERY}&)?(?:[\w.-]*signature|sig)=){_QUERY}", re.IGNORECASE)
"""The query of a URL that is signed: all of it changes when it is signed again."""
_PARAMETER = re.compile(
    r"([?&#](?:[\w.-]*(?:credential|token|secret|password|passwd|api[_-]?key|access[_-]?key(?:id)?)|pwd|auth)=)"
    r"[^&;#,\s\"']*",
    re.IGNORECASE,
)
_KEY = re.compile(r"([?&](?:key|code)=)[\w~%-]{20,}={0,2}(?=[&;#,\s\"']|$)", re.IGNORECASE)
"""Keys of Google's and Azure's services: long, and no name of a file."""
_HEADER = re.compile(r"(authorization[\"']?\s*[:=]\s*[\"']?\w+)\s+[^\s\"']+", re.IGNORECASE)
_OWN_HEADER = re.compile(r"(\bx-[\w-]*(?:key|token|secret)[\"']?\s*:\s*)[^\s\"']+", re.IGNORECASE)
_USER_OPTION = re.compile(r"(\s(?:-u|--user)[\s=]+[\"']?[^\s:\"']+:)[^\s\"']+")
"""curl's."""
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:PASSWORD|PASSWD|PASSPHRASE|PASS|SECRET|TOKEN|CREDENTIALS?|API_?KEY|KEY|KEY_ID|AUTH|SAS|CONNECTION_STRING)"
    r"(?:_|$)",
    re.IGNORECASE,
)
_SHORTEST = 6
"""Characters of a value that is looked for: a shorter one would be found in other words. Two more where no
configuration takes it."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, changes of the direction of writing, and halves of characters, which no terminal can print."""


def hide_variables(text: str) -> None:
    """Note the environment variables that a configuration's text takes, for `redact` in this process and its children.

    Args:
        text: YAML or an override, before anything is resolved.
    """
    names = dict.fromkeys([*_hidden_names(), *_TAKEN.findall(text)])
    if names:
        os.environ[HIDDEN] = ",".join(names)


def redact(text: str) -> str:
    """Return a text without credentials."""
    return _without(_secrets(), text)


def without_url_secrets(text: str) -> str:
    """Return a text without passwords and signed parameters of URLs, and without authorisation headers."""
    text = _LOGIN.sub(r"\1***@", _PASSWORD.sub(r"\1:***@", text))
    text = _KEY.sub(r"\1***", _PARAMETER.sub(r"\1***", _SIGNED.sub(SIGNED, text)))
    return _USER_OPTION.sub(r"\1***", _OWN_HEADER.sub(r"\1***", _HEADER.sub(r"\1 ***", text)))


def redacted(value: Any) -> Any:
    """Return a tree of mappings and lists whose texts are without credentials."""
    return _each_text(value, partial(_without, _secrets()))


def identity(value: Any) -> Any:
    """Return what of such a tree tells one run's configuration from another's: credentials may change, and do.

    Of the environment variables only those are left out that a configuration takes and whose name says that they are
    secret: another value of `${oc.env:SHARDS}` is another run.
    """
    taken = set(_hidden_names())
    secrets = [(name, value) for name, value in _secrets() if name in taken and _SECRET_NAME.search(name)]
    return _each_text(value, partial(_without, secrets))


def resolved(value: Any) -> Any:
    """Return a tree that was written, with the environment's values in the place of `${oc.env:NAME}` where they are.

    Secrets stay out of it: nothing that is read from a file needs them.
    """
    return _each_text(value, lambda text: _WRITTEN.sub(_value_of, text))


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_each_text(name, change): _each_text(entry, change) for name, entry in value.items()}
    return type(value)(_each_text(entry, change) for entry in value) if isinstance(value, list | tuple) else value


def _without(secrets: Sequence[tuple[str, str]], text: str) -> str:
    for name, value in secrets:
        text = text.replace(value, f"${{oc.env:{name}}}")
    return without_url_secrets(text)


def _value_of(written: re.Match[str]) -> str:
    return written[0] if _SECRET_NAME.search(written[1]) else os.environ.get(written[1], written[0])


def printable(text: str) -> str:
    """Return a text with control characters, line breaks included, written out as `\\x1b` or `\\n`."""
    return _CONTROL.sub(lambda control: control[0].encode("unicode_escape").decode("ascii"), text)


def shown(text: str) -> str:
    """Return a line as a terminal may show it: without credentials and without control characters."""
    return printable(redact(text))


def _hidden_names() -> list[str]:
    return [name for name in os.environ.get(HIDDEN, "").split(",") if name]


def _secrets() -> list[tuple[str, str]]:
    """Names and values of the environment variables that are secret, long values first, which may hold short ones."""
    taken = set(_hidden_names())
    named = [name for name in os.environ if name in taken or _SECRET_NAME.search(name)]
    secrets = [(name, os.environ[name]) for name in named if _is_secret(name, os.environ[name], name in taken)]
    return sorted(secrets, key=lambda secret: -len(secret[1]))


def _is_secret(name: str, value: str, taken: bool) -> bool:
    """Whether the value of a variable that a configuration takes, or whose name says so, is a credential.

    Args:
        name: of the variable.
        value: of it.
        taken: whether a configuration takes it.
    """
    if value.startswith("/") and os.path.exists(f"/{value.split('/')[1]}"):
        return False  # a place on this machine
    if _SECRET_NAME.search(name):
        return len(value) >= (_SHORTEST if taken else _SHORTEST + 2)
    is_plain = re.fullmatch(r"[\d.e+-]+", value) is not None or os.path.exists(value)
    return len(value) >= _SHORTEST and not is_plain
