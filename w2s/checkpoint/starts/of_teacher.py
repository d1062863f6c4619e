"""Which teachers a masked run had, and its student as though one of them had been the only one."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from w2s.checkpoint.own.checkpoint_folders import Meta
from w2s.checkpoint.weights.released import Released
from w2s.config.sections import TeacherConfig
from w2s.errors import CheckpointError, ConfigError

OTHERS = "visual.teachers."
"""Where the heads for all teachers but the first are, under released names."""
_HEADS = ("lm_head.", "head.", "summary_proj.")
_HEAD, _HEAD_BIAS, _TO_TARGET = "visual.head.weight", "visual.head.bias", "visual.summary_proj.weight"


def teachers_of(meta: Meta) -> dict[str, TeacherConfig]:
    """The teachers of a masked run by name, in their order: sources, and which weights of a run.

    Raises:
        CheckpointError: the checkpoint does not say them.
    """
    section = meta.config.get("teachers")
    several = section.get("of") if isinstance(section, Mapping) else None
    if not several:
        meta.setting("teacher", "name"), meta.setting("teacher", "source")  # or an error
        several = [meta.config["teacher"]]
    try:
        return {str(entry["name"]): _teacher(entry) for entry in several}
    except (TypeError, LookupError) as error:
        raise CheckpointError(f"the teachers of a checkpoint of {meta.stage} cannot be read: use another") from error


def _teacher(entry: Mapping[str, Any]) -> TeacherConfig:
    weights = entry.get("weights", "last")  # older checkpoints do not say
    return TeacherConfig(name=str(entry["name"]), source=str(entry["source"]), weights=weights)


def choose(meta: Meta, teacher: str, key: str) -> str:
    """Return the name of a masked run's teacher; an empty one stands for the first.

    Args:
        meta: of the run.
        teacher: its name, or empty.
        key: what the user has named it with, for the message.

    Raises:
        ConfigError: the run had no such teacher.
    """
    names = list(teachers_of(meta)) if meta.trained == "mim" else []
    if teacher and not names:
        raise ConfigError(f"{key}={teacher}: a run of {meta.stage} has no heads of teachers, leave it out")
    if teacher and teacher not in names:
        near = difflib.get_close_matches(teacher, names, n=1, cutoff=0.0)
        raise ConfigError(f"{key}={teacher}: the run had {', '.join(names)}: did you mean {near[0]}?")
    return teacher or names[0]


class OfTeacher(Released):
    """A masked run whose heads for one teacher have the names of a single teacher's.

    Args:
        source: the run.
        meta: of the run.
        teacher: the teacher's name.
        alone: leave out the heads for the others, which else are under their teachers' names.
    """

    def __init__(self, source: Released, meta: Meta, teacher: str, *, alone: bool = False) -> None:
        self.format, self.path, self.heads = source.format, source.path, source.heads
        self._source, (first, *_) = source, teachers_of(meta)
        renamed = dict(self._renamed(first, teacher))
        self._origins = {name: origin for name, origin in renamed.items() if not (alone and name.startswith(OTHERS))}
        self.meta = {name: source.meta[origin] for name, origin in self._origins.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor in the released layout."""
        return self._source.read(self._origins[name])

    def origin(self, name: str) -> str:
        """Return the name that a tensor has in the checkpoint itself."""
        return self._source.origin(self._origins[name])

    def _renamed(self, first: str, teacher: str) -> Iterator[tuple[str, str]]:
        """New names and old ones: the teacher's heads change places with the first one's."""
        own = f"{OTHERS}{teacher}."
        for name in self._source.meta:
            if name.startswith(own):
                yield name.replace(own, "visual."), name
            elif teacher != first and name.startswith(tuple(f"visual.{head}" for head in _HEADS)):
                yield name.replace("visual.", f"{OTHERS}{first}.", 1), name
            else:
                yield name, name


class InTeachersSpace(Released):
    """A masked run whose projection leads all the way into the teacher's own space.

    Where the teacher's summary has another width than the CLIP to come, a second linear of the masked stage leads
    there; the product of both is one projection.

    Raises:
        ConfigError: the tower ends in SigLIP's pool, which has no projection, and the widths differ.
    """

    def __init__(self, source: Released) -> None:
        self.format, self.path, self.heads, self._source = source.format, source.path, source.heads, source
        self.meta = {name: tensor for name, tensor in source.meta.items() if name != _TO_TARGET}
        if _TO_TARGET in source.meta:
            if _HEAD not in source.meta:
                raise ConfigError(f"--head: a pool of {source.path} leads into no space of another width, leave it out")
            width, last = source.meta[_TO_TARGET].shape[0], source.meta[_HEAD]
            self.meta[_HEAD] = torch.empty(width, last.shape[1], dtype=last.dtype, device="meta")
            if _HEAD_BIAS in self.meta:
                self.meta[_HEAD_BIAS] = torch.empty(width, dtype=last.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """Return a tensor in the released layout."""
        tensor = self._source.read(name)
        if name not in (_HEAD, _HEAD_BIAS) or _TO_TARGET not in self._source.meta:
            return tensor
        return (self._source.read(_TO_TARGET).float() @ tensor.float()).to(tensor.dtype)

    def origin(self, name: str) -> str:
        """Return the name that a tensor has in the checkpoint itself."""
        return self._source.origin(name)
