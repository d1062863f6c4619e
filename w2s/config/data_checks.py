"""What the section `data` may say, beside the stage and its steps."""

from w2s.config.sections import Config
from w2s.errors import ConfigError


def check_data(config: Config) -> None:
    """Refuse training data that are missing, or of another stage.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    if not config.data.train and not (config.data.phases and all(phase.train for phase in config.data.phases)):
        raise ConfigError("data.train is empty: give the training shards, such as data.train='shards/{0000..0099}.tar'")
    _check_frames(config)
    _check_phases(config)


def _check_frames(config: Config) -> None:
    if config.stage == "mim" and config.data.frames > 1:
        raise ConfigError(
            f"data.frames={config.data.frames} is for the contrastive stage: the masked stage learns from the middle "
            "frame of a clip, leave it out"
        )


def _check_phases(config: Config) -> None:
    phases, train = config.data.phases, config.train
    if not phases:
        return
    samples, needed = sum(phase.samples for phase in phases), train.steps * train.global_batch
    if phases[-1].samples and samples != needed:
        raise ConfigError(
            f"data.phases have {samples} samples, but train.steps={train.steps} x train.global_batch="
            f"{train.global_batch} are {needed}: use train.steps={samples // train.global_batch}, or samples: 0 in the "
            "last phase, which lasts to the end"
        )
    for key in ("patch_dropout", "frames"):
        if config.stage != "clip" and any(getattr(phase, key) is not None for phase in phases):
            raise ConfigError(f"data.phases: {key} is for the contrastive stage, not for {config.stage}: remove it")
