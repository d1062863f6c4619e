"""Where a run takes its weights, optimizer and place in the data from when it begins."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from w2s.checkpoint.own import checkpoint_folders
from w2s.checkpoint.own.in_memory import HostMemory
from w2s.checkpoint.own.verifying import verify
from w2s.checkpoint.starts.continued import find_continued
from w2s.checkpoint.starts.handover import Handover, check_shapes
from w2s.config.naming import difference
from w2s.config.sections import Config
from w2s.errors import UserError
from w2s.megatron.checkpoint import state
from w2s.megatron.parallel.sharded import unsharded
from w2s.training.stage import Stage


@dataclass(frozen=True)
class Resumed:
    """Where a run stands when its loop begins."""

    step: int = 0
    """Optimizer steps done."""
    parent: str | None = None
    """Checkpoint that its weights came from at first."""
    handover: Handover | None = None
    """What became of the weights that `init` names."""
    position: dict[str, Any] | None = None
    """Place in the data; None at its beginning."""
    news: tuple[str, ...] = ()
    """What the user is told."""


def resume(stage: Stage, config: Config, folder: Path, memory: HostMemory | None) -> Resumed:
    """Resume the run where it stands, or begin it.

    The first of these that there is:

    1. This run's checkpoint in the memory of the hosts: weights, optimizer and data position.
    2. Its latest checkpoint on disk, as `recover` has left it: the same.
    3. The checkpoint that `init.checkpoint` names: the same.
    4. The weights that `init` names; a new optimizer.
    5. The weights drawn from the seed.

    Raises:
        UserError: the run was begun with another configuration.
    """
    if memory is not None and memory.meta is not None:
        meta = memory.meta
        _refuse_another_run(config, folder, meta)
        stage.load_extra_state(state.restore(memory.read(), stage.towers, stage.optimizer, meta.step))
        return _with_place(_resumed(config, meta), "from the memory of the hosts")
    latest = checkpoint_folders.latest(folder)
    if latest is not None:
        _refuse_another_run(config, folder, checkpoint_folders.read_meta(latest))
        return _with_place(load_checkpoint(latest, stage, config))
    other = find_continued(config)
    if other is not None:
        verify(other)
        check_shapes(stage.towers, other)
        return _with_place(replace(load_checkpoint(other, stage, config), parent=str(other)))
    with unsharded(stage.towers.values()):
        handover = stage.begin()
    if handover is None:
        return Resumed()
    stage.optimizer.copy_model_to_master()
    return Resumed(parent=handover.parent, handover=handover)


def _with_place(resumed: Resumed, origin: str = "") -> Resumed:
    """Let the user be told first where the run resumes, if that is not just its last checkpoint."""
    origin = origin or (f"begun from {resumed.parent}" if resumed.step and resumed.parent else "")
    place = (f"resumes at step {resumed.step}, {origin}",) if origin else ()
    return replace(resumed, news=(*place, *resumed.news))


def load_checkpoint(checkpoint: Path, stage: Stage, config: Config) -> Resumed:
    """Load all that a checkpoint holds."""
    meta = checkpoint_folders.read_meta(checkpoint)
    stage.load_extra_state(state.load(checkpoint, stage.towers, stage.optimizer, meta.step))
    return _resumed(config, meta)


def _resumed(config: Config, meta: checkpoint_folders.Meta) -> Resumed:
    return Resumed(meta.step, meta.parent, position=dict(meta.data), news=_news_of_average(config, meta))


def _news_of_average(config: Config, meta: checkpoint_folders.Meta) -> tuple[str, ...]:
    """Say where the moving average of the weights begins anew, or ends."""
    kept, saved = bool(config.optim.ema), bool(meta.config.get("optim", {}).get("ema"))
    if kept and not saved:
        return (f"the moving average begins at the weights of step {meta.step}: there was none before",)
    if saved and not kept:
        return (f"the moving average ends at step {meta.step}: optim.ema=0 keeps none",)
    return ()


def _refuse_another_run(config: Config, folder: Path, meta: checkpoint_folders.Meta) -> None:
    differing = difference(config, meta.config)
    if differing is not None:
        key, then, now = differing
        raise UserError(f"{folder} was begun with {key}={then}, not {key}={now}: keep that, or choose another run.name")
