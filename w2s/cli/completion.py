"""What the shell completes: stages, keys of the configuration, names of its files, runs."""

from pathlib import Path

STAGES = ("mim", "clip", "eval")


def complete_stage(incomplete: str) -> list[str]:
    """Return the stages."""
    return [stage for stage in STAGES if stage.startswith(incomplete)]


def complete_override(args: list[str], incomplete: str) -> list[str]:
    """Keys with `=`, and behind that the names or the words that a key takes.

    Args:
        args: words before; bash makes three of `model=eva`.
        incomplete: the word that is being written.
    """
    from w2s.config.fields import FIELDS
    from w2s.config.load import GROUPS

    if incomplete == "=" or (args and args[-1] == "="):  # bash
        key, text = args[-1 if incomplete == "=" else -2], incomplete.lstrip("=")
        return [value for value in _values(key) if value.startswith(text)]
    key, equals, text = incomplete.partition("=")
    if equals:  # zsh, fish
        return [f"{key}={value}" for value in _values(key) if value.startswith(text)]
    return [f"{name}=" for name in (*GROUPS, *FIELDS) if name.startswith(incomplete)]


def complete_pipeline(args: list[str], incomplete: str) -> list[str]:
    """The files of `configs/run`, then overrides."""
    return [name for name in _files("run") if name.startswith(incomplete)] + complete_override(args, incomplete)


def complete_run(incomplete: str) -> list[str]:
    """The runs below ./runs, and those inside of a `w2s run`."""
    folders = [path.parent for pattern in ("*/*.json", "*/*/*.json") for path in Path("runs").glob(pattern)]
    names = dict.fromkeys(str(folder.relative_to("runs")) for folder in sorted(folders) if _is_run(folder))
    return [name for name in names if name.startswith(incomplete)]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.yaml", "group.json"))


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
