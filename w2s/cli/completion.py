"""What the shell completes: stages, keys of the configuration, names of its files, runs."""

from pathlib import Path

import typer


def complete_stage(incomplete: str) -> list[str]:
    """Return the stages."""
    from w2s.config.load import STAGES

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
    from w2s.config.load import names_of

    return [name for name in names_of("run") if name.startswith(incomplete)] + complete_override(ctx, incomplete)


def complete_run(incomplete: str) -> list[str]:
    """Return the runs below ./runs, and those inside of a `w2s run`."""
    places = [depth + name for depth in ("*/", "*/*/") for name in ("config.yaml", "group.json")]
    names = sorted(path.parent.relative_to("runs").as_posix() for place in places for path in Path("runs").glob(place))
    return [name for name in names if name.startswith(incomplete)]


def _values(key: str) -> list[str]:
    from w2s.config.fields import choices
    from w2s.config.load import GROUPS, names_of

    return names_of(key) if key in GROUPS else choices(key)
