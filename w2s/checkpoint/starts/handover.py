"""From one stage to the next: which tensors of a checkpoint a tower takes, and which it does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

from w2s.checkpoint.find import find
from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.own.verifying import verify
from w2s.checkpoint.starts.growth import NO_GROWTH, Growth, Size, grow
from w2s.checkpoint.starts.of_teacher import OTHERS, choose, of_teacher
from w2s.checkpoint.weights.eva_format import POOL, TOWERS, released_name
from w2s.checkpoint.weights.matching import (
    LOGIT_PARAMETERS,
    OPTIONAL,
    PROJECTIONS,
    STAGE_ONLY,
    Fit,
    fit,
    hint,
    summary,
)
from w2s.checkpoint.weights.released import Released, open_released
from w2s.config.sections import Config, Weights
from w2s.errors import CheckpointError, ConfigError
from w2s.megatron.checkpoint import state
from w2s.megatron.model.initialize import load_slices
from w2s.megatron.parallel.optimizer import Towers
from w2s.megatron.parallel.sharded import ShardedTower

Shapes = Mapping[str, tuple[int, ...]]
Projections = Literal["keep", "fresh"]


@dataclass(frozen=True)
class Handover:
    """What becomes of the tensors of one tower or of both.

    Attributes:
        sources: the checkpoints: one, or the vision tower's and the text tower's.
        loaded: tensors taken over.
        dropped: tensors of the checkpoints that this stage has no use for.
        new: tensors of this stage that start afresh.
        grown: tensors taken over for a deeper or wider tower.
        resized: tensors taken over and resampled for another image or patch size.
        averaged: those of the checkpoints whose moving average was taken.
    """

    sources: list[Path]
    loaded: list[str]
    dropped: list[str]
    new: list[str]
    grown: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    averaged: list[Path] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Say where the tensors come from."""
        average = f", the moving average of {_joined(self.averaged)}" if self.averaged else ""
        return f"taken from {self.parent}{average}"

    @property
    def parent(self) -> str:
        """The checkpoints that the tensors come from: one, or the vision tower's `and` the text tower's."""
        return _joined(self.sources)

    def rows(self) -> list[list[str]]:
        """Return the table's rows: what happened, how many tensors, which."""
        return [
            ["loaded", str(len(self.loaded)), summary(self.loaded)],
            *([["grown", str(len(self.grown)), summary(self.grown)]] if self.grown else []),
            *([["resized", str(len(self.resized)), ", ".join(self.resized)]] if self.resized else []),
            ["dropped", str(len(self.dropped)), summary(self.dropped)],
            ["new", str(len(self.new)), ", ".join(self.new)],
        ]

    def __add__(self, other: "Handover") -> "Handover":
        """Join what became of two towers."""
        return Handover(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def _joined(checkpoints: Sequence[Path]) -> str:
    return " and ".join(str(path) for path in dict.fromkeys(checkpoints))


def take_over(towers: Towers, config: Config, teacher_text: tuple[Path, Weights] | None = None) -> Handover | None:
    """Verify and load the towers that `init.vision` and `init.text` name; nothing for `none`. Every rank calls.

    Args:
        towers: the stage's towers.
        config: the stage.
        teacher_text: what holds the text tower of the teacher, and which of its weights, where `init.text` is
            `teacher`.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it does not fit.
    """
    root = Path(config.run.root).expanduser()
    sources: dict[str, tuple[Path, Weights]] = {}
    for name, what, stage in (("vision", config.init.vision, "mim"), ("text", config.init.text, "clip")):
        if name not in towers:
            continue
        if name == "text" and teacher_text is not None:
            sources[name] = teacher_text
        elif (checkpoint := find(what, root, key=f"init.{name}", stage=stage)) is not None:
            sources[name] = checkpoint, config.init.weights
    for checkpoint in dict.fromkeys(checkpoint for checkpoint, _ in sources.values()):
        verify(checkpoint)
    growth = Growth(config.init.grow, config.init.grow_width, config.run.seed)
    handovers = [
        hand_over(
            towers[name],
            name,
            checkpoint,
            config.init.projections,
            growth,
            teacher=config.init.teacher if name == "vision" else "",
            weights=weights,
        )
        for name, (checkpoint, weights) in sources.items()
    ]
    return reduce(add, handovers) if handovers else None


def hand_over(
    tower: ShardedTower[Any],
    name: str,
    checkpoint: Path,
    projections: Projections = "keep",
    growth: Growth = NO_GROWTH,
    *,
    teacher: str = "",
    weights: Weights = "last",
) -> Handover:
    """Load the weights of tower `name` from a checkpoint of an earlier stage or from other people's weights.

    Every rank calls, and reads its own slices alone. Optimizer state and FP8 state stay behind.

    Args:
        tower: the tower.
        name: `vision` or `text`.
        checkpoint: a folder with meta.json, a weights file, an index, or a folder of weights.
        projections: whether heads and logit scale that fit are taken along.
        growth: how the checkpoint's tower becomes deeper or wider, if it is smaller.
        weights: the checkpoint's last ones, or their moving average.
        teacher: whose head is taken, of a masked run that had several teachers; empty for the first one's.

    Raises:
        CheckpointError: the checkpoint's tower has other shapes, or lacks something.
        ConfigError: the run had no such teacher.
    """
    towers = {name: tower}
    shapes = state.tower_shapes(towers)
    stored = open_released(checkpoint, weights)
    source, changed = _of_teacher(stored, teacher, alone=bool(growth)), set[str]()
    if growth:
        source, changed = _grown(source, tower, name, growth)
    taken = fit(source, _wanted(shapes, source, projections), {name: tower.chunks[0].config.num_attention_heads})
    _check(taken, name)
    if stored.format == "w2s" and source is stored:
        state.load_weights(checkpoint, towers, taken.loaded, weights)
        load_slices({name: tower.chunks}, taken.read, taken.resized)
    else:
        load_slices({name: tower.chunks}, taken.read, taken.taken)
    grown = {ours for ours in taken.loaded if released_name(ours) in changed}
    return Handover(
        sources=[checkpoint],
        loaded=sorted(set(taken.loaded) - grown),
        dropped=sorted(source.origin(other) for other in _of_tower(taken, name)),
        new=sorted(shapes.keys() - set(taken.taken)),
        grown=sorted(grown),
        resized=sorted(taken.resized),
        averaged=[checkpoint] if weights == "ema" else [],
    )


def _of_teacher(source: Released, teacher: str, *, alone: bool) -> Released:
    """A masked run with the heads of one of several teachers, see `of_teacher`; anything else as it is.

    Raises:
        ConfigError: there is no such teacher.
    """
    if source.format != "w2s":
        if teacher:
            raise ConfigError(f"init.teacher={teacher}: {source.path} is not a masked run of w2s, leave it out")
        return source
    meta = read_meta(source.path)
    several = any(name.startswith(OTHERS) for name in source.meta)
    if not (teacher or several):
        return source
    chosen = choose(meta, teacher, "init.teacher")
    return of_teacher(source, meta, chosen, alone=alone) if several else source


def _grown(source: Released, tower: ShardedTower[Any], name: str, growth: Growth) -> tuple[Released, set[str]]:
    part = tower.chunks[0]
    size = Size(
        layers=part.config.num_layers,
        width=part.config.hidden_size,
        heads=part.config.num_attention_heads,
        mlp_width=part.config.ffn_hidden_size,
    )
    post_norm = name == "vision" and part.shape.norm_placement == "post"
    return grow(source, TOWERS[name][0], size, post_norm, growth)


def _wanted(shapes: Shapes, source: Released, projections: Projections) -> Shapes:
    """Leave out what serves the masked stage alone, and projections that do not fit or are to start afresh.

    The scalars of the loss are taken together, and with the projection alone.
    """

    def fits(names: list[str]) -> bool:
        return all(
            source.holds(name) and tuple(source.meta[released_name(name)].shape) == shapes[name] for name in names
        )

    added = [name for name in shapes if name.startswith(PROJECTIONS)]
    scalars, heads = (
        [name for name in added if name.startswith(LOGIT_PARAMETERS) == scalar] for scalar in (True, False)
    )
    kept: set[str] = set()
    if projections == "keep" and fits(heads):
        kept = {*heads, *(scalars if fits(scalars) else [])}
    return {
        name: shape
        for name, shape in shapes.items()
        if not name.startswith(STAGE_ONLY) and (name in kept or not name.startswith(PROJECTIONS))
    }


def _of_tower(taken: Fit, tower: str) -> list[str]:
    """Released names of the same tower's tensors that are not taken."""
    prefixes = {"vision": ("visual.",), "text": ("text.", "logit_scale", "logit_bias")}
    return sorted(name for name in taken.unexpected if name.startswith(prefixes[tower]))


def _check(taken: Fit, tower: str) -> None:
    """Refuse a checkpoint whose tower is not of this model, up to what another stage may do without."""
    optional = OPTIONAL if "vision.cls_token" in taken.shapes else (*OPTIONAL, POOL)
    surplus = [name for name in _of_tower(taken, tower) if not name.startswith(optional)]
    if taken.misfits:
        reason = taken.misfit()
    elif taken.missing:
        reason = f"it has no {min(taken.missing)}"
        if ".layers." in reason:
            reason += " (a deeper tower grows out of it with init.grow)"
    elif surplus:
        reason = f"this model has no {taken.source.origin(surplus[0])}"
    else:
        return
    raise _another_model(taken.source.path, f"{reason}{hint(taken.source)}")


def _another_model(checkpoint: Path, reason: str) -> CheckpointError:
    if (checkpoint / "meta.json").is_file():
        name = read_meta(checkpoint).setting("model", "name")
        return CheckpointError(
            f"{checkpoint} is of another model (model={name}): {reason}; use model={name} or another checkpoint"
        )
    return CheckpointError(f"{checkpoint} is of another model: {reason}; use another file, or the model that it holds")


def load_all(towers: Towers, checkpoint: Path, weights: Weights = "last") -> None:
    """Verify a finished stage's checkpoint and load every weight of the towers from it; every rank calls.

    Raises:
        CheckpointError: the checkpoint is damaged, its towers have other shapes, or lack something, such as a moving
            average.
    """
    verify(checkpoint)
    state.load_weights(checkpoint, towers, check_shapes(towers, checkpoint), weights)


def check_shapes(towers: Towers, checkpoint: Path) -> Shapes:
    """Refuse a checkpoint of other weights than those of the towers, whose shapes are returned; every rank calls.

    Raises:
        CheckpointError: the checkpoint's towers have other shapes, or lack something.
    """
    shapes, saved = state.tower_shapes(towers), state.saved_shapes(checkpoint)
    missing, surplus = sorted(shapes.keys() - saved.keys()), sorted(saved.keys() - shapes.keys())
    misfits = sorted(key for key in shapes.keys() & saved.keys() if shapes[key] != saved[key])
    if misfits:
        key = misfits[0]
        raise _another_model(checkpoint, f"{key} is {list(saved[key])} there and {list(shapes[key])} here")
    if missing:
        raise _another_model(checkpoint, f"it has no {missing[0]}")
    if surplus:
        raise _another_model(checkpoint, f"this model has no {surplus[0]}")
    return shapes
