"""What the shell completes: stages, keys of the configuration, names of its files, runs."""

from pathlib import Path

import typer

STAGES = ("mim", "clip", "eval")


def complete_stage(incomplete: str) -> list[str]:
    """Return the stages."""
    return [stage for stage in STAGES if stage.startswith(incomplete)]


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return keys with `=`, and behind that the names or the words that a key takes.

    Args:
        ctx: with the words before; bash makes three of `model=eva`.
        incomplete: the word that is being written.
    """
    from w2s.config.fields import FIELDS
    from w2s.config.load import GROUPS

    before = [word for words in ctx.params.values() if isinstance(words, list | tuple) for word in words]
    asked = before[-2] if before[-1:] == ["="] and len(before) > 1 else before[-1] if before else ""
    if asked in (*GROUPS, *FIELDS):  # bash
        return [value for value in _values(asked) if value.startswith(incomplete)]
    key, equals, text = incomplete.partition("=")
    if equals:  # zsh, fish
        return [f"{key}={value}" for value in _values(key) if value.startswith(text)]
    return [f"{name}=" for name in (*GROUPS, *FIELDS) if name.startswith(incomplete)]


def complete_pipeline(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the files of `configs/run`, then what `complete_override` returns."""
    return [name for name in _files("run") if name.startswith(incomplete)] + complete_override(ctx, incomplete)


def complete_run(incomplete: str) -> list[str]:
    """Return the runs below ./runs, and those inside of a `w2s run`."""
    places = [depth + name for depth in ("*/", "*/*/") for name in ("config.yaml", "group.json")]
    names = sorted(path.parent.relative_to("runs").as_posix() for place in places for path in Path("runs").glob(place))
    return [name for name in names if name.startswith(incomplete)]


def _values(key: str) -> list[str]:
    from typing import Literal, get_args, get_origin

    from w2s.config.fields import FIELDS
    from w2s.config.load import GROUPS

    if key in GROUPS:
        return _files(key)
    hint = FIELDS.get(key)
    if hint is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(hint)] if get_origin(hint) is Literal else []


def _files(group: str) -> list[str]:
    from importlib.resources import files

    folder = files("w2s.configs") / group
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
