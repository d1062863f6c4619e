"""From one stage to the next: which tensors of a checkpoint a tower takes, and which it does not."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2s.checkpoint.find import find
from w2s.checkpoint.store import read_meta
from w2s.config.sections import Config
from w2s.errors import CheckpointError
from w2s.megatron import state
from w2s.megatron.optimizer import Towers
from w2s.megatron.sharded import ShardedTower

DROPPED = ("lm_head", "mask_token", "head", "text_projection", "logit_scale", "logit_bias")
"""What serves one stage alone (baaivision/EVA, the skip list of every released stage-2 command)."""


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Handover:
    """What becomes of the tensors of a tower.

    Attributes:
        source: the checkpoint.
        loaded: tensors taken over.
        dropped: tensors of the checkpoint that this stage has no use for.
        new: tensors of this stage that start afresh.
    """

    source: Path
    loaded: list[str]
    dropped: list[str]
    new: list[str]

    def rows(self) -> list[list[str]]:
        """Return the table's rows: what happened, how many tensors, which."""
        return [
            ["loaded", str(len(self.loaded)), _summary(self.loaded)],
            ["dropped", str(len(self.dropped)), ", ".join(self.dropped)],
            ["new", str(len(self.new)), ", ".join(self.new)],
        ]


def take_over_vision(tower: ShardedTower[Any], config: Config) -> Handover | None:
    """Load the vision tower that `init.vision` names; nothing for `none`. Every rank calls.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not fit.
    """
    root = Path(config.run.root).expanduser()
    checkpoint = find(config.init.vision, root, key="init.vision", stage="mim")
    return hand_over(tower, "vision", checkpoint) if checkpoint else None


def hand_over(tower: ShardedTower[Any], name: str, checkpoint: Path) -> Handover:
    """Load the weights of tower `name` from a checkpoint of an earlier stage; every rank calls.

    Optimizer state and FP8 state stay behind.

    Raises:
        CheckpointError: the checkpoint's tower has other shapes, or lacks something.
    """
    own = state.tower_shapes({name: tower})
    saved = {key: shape for key, shape in state.saved_shapes(checkpoint).items() if key.startswith(f"{name}.")}
    _check(checkpoint, _lasting(own, name), _lasting(saved, name))
    shared = _lasting(own, name).keys()
    state.load_weights(checkpoint, {name: tower}, shared)
    return Handover(
        source=checkpoint,
        loaded=sorted(shared),
        dropped=sorted(saved.keys() - shared),
        new=sorted(own.keys() - shared),
    )


def load_all(towers: Towers, checkpoint: Path) -> None:
    """Load every weight of the towers from a finished stage's checkpoint; every rank calls.

    Raises:
        CheckpointError: the checkpoint's towers have other shapes, or lack something.
    """
    own = state.tower_shapes(towers)
    _check(checkpoint, own, state.saved_shapes(checkpoint))
    state.load_weights(checkpoint, towers, own)


def _check(checkpoint: Path, own: Shapes, saved: Shapes) -> None:
    """Refuse a checkpoint that does not hold exactly the tensors of this model."""
    if own == saved:
        return
    missing, surplus = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    misfits = sorted(key for key in own.keys() & saved.keys() if own[key] != saved[key])
    if misfits:
        key = misfits[0]
        reason = f"{key} is {list(saved[key])} there and {list(own[key])} here"
    elif missing:
        reason = f"it has no {missing[0]}"
    else:
        reason = f"this model has no {surplus[0]}"
    name = read_meta(checkpoint).config["model"]["name"]
    raise CheckpointError(
        f"{checkpoint} is of another model (model={name}): {reason}; use model={name} or another checkpoint"
    )


def _lasting(shapes: Shapes, tower: str) -> dict[str, tuple[int, ...]]:
    """Leave out what serves one stage alone."""
    return {key: shape for key, shape in shapes.items() if not key.removeprefix(f"{tower}.").startswith(DROPPED)}


def _summary(names: list[str]) -> str:
    layers = [name for name in names if ".blocks." in name]
    others = [name for name in names if ".blocks." not in name]
    return ", ".join([*others, f"{len(layers)} tensors in the layers"])
