"""Where the weights of a training come from: the section `init`."""

from w2s.config.sections import Config, InitConfig
from w2s.errors import ConfigError


def check_init(config: Config) -> None:
    """Refuse a start that brings the same weights twice, or that there is nothing for.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    _check_continued(config)
    _check_weights(config)
    _check_growth(config.init)
    if config.stage == "mim" and config.init.text != "none":
        raise ConfigError(f"init.text={config.init.text}: the masked stage has no text tower, leave init.text out")


def _check_continued(config: Config) -> None:
    """A checkpoint that is continued from has all towers; `latest` is what a stage takes without being told."""
    init, scale = config.init, config.clip.logit_scale
    given = {
        f"init.vision={init.vision}": init.vision not in ("none", "latest"),
        f"init.text={init.text}": init.text != "none",
        f"clip.logit_scale={scale}": config.stage == "clip" and scale is not None,
        f"init.weights={init.weights}": init.weights != "last",
    }
    for setting, is_given in given.items():
        if init.checkpoint != "none" and is_given:
            raise ConfigError(
                f"{setting} does nothing with init.checkpoint={init.checkpoint}, which brings all weights: "
                "leave one of them out"
            )


def _check_weights(config: Config) -> None:
    """A moving average is there to be measured or taken over."""
    init = config.init
    if config.eval.weights == "ema" and not config.optim.ema:
        raise ConfigError("eval.weights=ema while training needs an average: set optim.ema, such as optim.ema=0.9999")
    if config.eval.weights == "ema" and config.precision.fp8_primary_weights:
        raise ConfigError(
            "eval.weights=ema while training with precision.fp8_primary_weights=true would round the weights again: "
            "measure the average with w2s stage eval"
        )
    if init.weights == "ema" and {init.vision, init.text} <= {"none", "teacher"}:
        raise ConfigError(
            f"init.weights=ema does nothing with init.vision={init.vision} and init.text={init.text}: name a run there"
        )


def _check_growth(init: InitConfig) -> None:
    for key, how in (("init.grow", init.grow), ("init.grow_width", init.grow_width)):
        if how != "none" and (init.checkpoint != "none" or init.vision == init.text == "none"):
            raise ConfigError(
                f"{key}={how} needs a finished tower: name one with init.vision or init.text, or leave it out"
            )
