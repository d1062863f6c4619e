"""A training that continues from a checkpoint of another run: what that has to be."""

from dataclasses import replace
from pathlib import Path

from w2s.checkpoint.find import find
from w2s.checkpoint.own.checkpoint_folders import Meta, latest, read_meta
from w2s.config.sections import Config
from w2s.errors import CheckpointError


def find_continued(config: Config) -> Path | None:
    """Return the checkpoint that `init.checkpoint` tells a training to continue from, or None.

    Raises:
        CheckpointError: nothing is found.
    """
    root = Path(config.run.root).expanduser()
    return find(config.init.checkpoint, root, key="init.checkpoint", stage=config.stage)


def with_its_start(config: Config, run: Path) -> Config:
    """Return the configuration of a run with the start of what it continues from: where its towers once began.

    Optimizer, rates, schedule and length may be others than those that the checkpoint was written with. The stream of
    samples refuses another order of them.

    Raises:
        CheckpointError: no checkpoint of this stage, or one that has come as far already.
    """
    resumed = latest(run)
    checkpoint = resumed or find_continued(config)
    if config.init.checkpoint == "none" or checkpoint is None:
        return config
    meta = read_meta(checkpoint)
    if resumed is None:
        _check(config, checkpoint, meta)
    vision, text = (meta.setting("init", tower) for tower in ("vision", "text"))
    return replace(config, init=replace(config.init, vision=vision, text=text))


def _check(config: Config, checkpoint: Path, meta: Meta) -> None:
    if meta.stage != config.stage:
        raise CheckpointError(
            f"init.checkpoint={checkpoint} is of stage {meta.stage}, and {config.stage} cannot continue from it: "
            "use init.vision to begin with its weights"
        )
    if meta.step >= config.train.steps:
        raise CheckpointError(
            f"init.checkpoint={checkpoint} has done {meta.step} steps, which train.steps={config.train.steps} counts "
            "too: use more"
        )
