"""What every kind of teacher says when its name or its file is wrong."""

import difflib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from w2s.checkpoint.weights.released import Released
from w2s.checkpoint.weights.tensor_files import open_weights, weights_in
from w2s.config.sections import TeacherConfig
from w2s.errors import CheckpointError, ConfigError
from w2s.megatron.checkpoint.safe_unpickling import forbidden_class_error, refused_name

LOCAL = "local-dir:"
"""What timm and open_clip put before a folder that describes a model and holds its weights."""


def name_and_weights(rest: str) -> tuple[str, str]:
    """Split what follows `KIND:` in a source: `MODEL[@PATH]`, or `local-dir:FOLDER`, which is both."""
    if rest.startswith(LOCAL):
        folder = str(Path(rest.removeprefix(LOCAL)).expanduser())
        return f"{LOCAL}{folder}", folder
    name, _, path = rest.partition("@")
    return name, path


def unknown_model(library: str, name: str, known: Sequence[str]) -> ConfigError:
    """The error for a model that `library` does not have, with the nearest names that it has."""
    if ":" in name:
        return ConfigError(f"teacher.source: {name} is not downloaded: fetch it and give {library}:{LOCAL}FOLDER")
    near = difflib.get_close_matches(name, known, cutoff=0.4) or known[:3]
    return ConfigError(f"teacher.source: {library} has no model {name}, the nearest are {', '.join(near)}")


def check_weights(config: TeacherConfig) -> None:
    """Refuse to look for a moving average where there is none.

    Raises:
        ConfigError: the teacher is not a run of w2s.
    """
    if config.weights == "ema" and not config.source.startswith("w2s:"):
        raise ConfigError(f"teacher.weights=ema is for w2s:RUN: leave it out with teacher.source={config.source}")


def weights_file(path: str, kind: str, name: str) -> Path | None:
    """The file of `teacher.source=KIND:NAME@PATH`, in PATH if that is a folder; None where no path is given.

    Raises:
        CheckpointError: there is no such file.
    """
    file = Path(path).expanduser() if path else None
    if file is not None and not file.exists():
        raise CheckpointError(
            f"teacher weights {path} do not exist (from {Path.cwd()}): download them and give their path with "
            f"teacher.source={kind}:{name}{'' if name.startswith(LOCAL) else '@FILE'}"
        )
    return weights_in(file) if file is not None and file.is_dir() else file


def check_tensors(released: Released, expected: Mapping[str, Tensor], ignored: tuple[str, ...] = ()) -> None:
    """Refuse a checkpoint whose tower is not made of just the `expected` tensors, all of one tower.

    Raises:
        CheckpointError: one is missing, has another shape, or is too much; `ignored` are beginnings of names.
    """
    tower = f"{next(iter(expected)).partition('.')[0]}."
    held = {name for name in released.meta if name.startswith(tower) and not name.startswith(ignored)}
    misfits = {name for name in expected.keys() & held if expected[name].shape != released.meta[name].shape}
    missing, others = sorted(expected.keys() - held), sorted(misfits) or sorted(held - expected.keys())
    if missing or others:
        raise other_model(released, f"{missing[0]} is missing" if missing else f"{others[0]} does not fit")


def other_model(released: Released, reason: str) -> CheckpointError:
    """The error for a checkpoint that a teacher's tower is not in."""
    return CheckpointError(f"teacher weights {released.path} hold another model: {reason}; give the file of this one")


def indexed(file: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index names; none if `file` is not an index.

    Raises:
        CheckpointError: one of them is missing or damaged.
    """
    if not file.name.endswith(".index.json"):
        return {}
    tensors = open_weights(file)
    return {name: tensors.read(name) for name in tensors.meta}


@contextmanager
def reading(file: Path | None, name: str) -> Iterator[None]:
    """Turn what loaders raise over a damaged file or another model's file into one line.

    Raises:
        CheckpointError: the code inside could not load `file` into the model `name`.
    """
    try:
        yield
    except (
        RuntimeError, LookupError, ValueError, EOFError, OSError, ImportError, pickle.UnpicklingError, SafetensorError
    ) as error:  # fmt: skip
        if refused_name(error):
            raise forbidden_class_error(f"teacher weights {file}", refused_name(error)) from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"teacher weights {file} do not fit {name}, give the file of this model: {reason}"
        ) from error
