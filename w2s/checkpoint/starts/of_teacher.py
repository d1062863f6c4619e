"""Which teachers a masked run had, and its student as though one of them had been the only one."""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from w2s.checkpoint.own.checkpoint_folders import Meta
from w2s.checkpoint.weights.eva_format import HEAD, HEAD_BIAS
from w2s.checkpoint.weights.released import Released
from w2s.checkpoint.weights.views import Source, renamed
from w2s.config.sections import TeacherConfig
from w2s.errors import CheckpointError, ConfigError

OTHERS = "visual.teachers."
"""Where the heads for all teachers but the first are, under released names."""
_HEADS = ("lm_head.", "head.", "summary_proj.")
_TO_TARGET = "visual.summary_proj.weight"


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


def of_teacher(source: Released, meta: Meta, teacher: str, *, alone: bool = False) -> Released:
    """Return a masked run whose heads for one teacher have the names of a single teacher's.

    Args:
        source: the run.
        meta: of the run.
        teacher: the teacher's name.
        alone: leave out the heads for the others, which otherwise are under their teachers' names.
    """
    first, *_ = teachers_of(meta)
    chosen, heads = f"{OTHERS}{teacher}.", tuple(f"visual.{head}" for head in _HEADS)
    sources = {}
    for name in source.meta:
        new = name
        if name.startswith(chosen):
            new = name.replace(chosen, "visual.")
        elif teacher != first and name.startswith(heads):  # they change places with the first one's
            new = name.replace("visual.", f"{OTHERS}{first}.", 1)
        if not (alone and new.startswith(OTHERS)):
            sources[new] = renamed(name)
    return source.made_into(sources)


def in_teachers_space(source: Released) -> Released:
    """Return a masked run whose projection leads all the way into the teacher's own space.

    Where the teacher's summary has another width than the CLIP to come, a second linear of the masked stage leads
    there; the product of both is one projection.

    Raises:
        ConfigError: the tower ends in SigLIP's pool, which has no projection, and the widths differ.
    """
    if _TO_TARGET not in source.meta:
        return source
    if HEAD not in source.meta:
        raise ConfigError(f"--head: a pool of {source.path} leads into no space of another width, leave it out")

    def product(last: Tensor, head: Tensor) -> Tensor:
        return (last.float() @ head.float()).to(head.dtype)

    return source.made_into(
        {
            name: Source((_TO_TARGET, name), product) if name in (HEAD, HEAD_BIAS) else renamed(name)
            for name in source.meta
            if name != _TO_TARGET
        }
    )
