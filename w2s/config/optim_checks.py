"""What the section `optim` may say, beside the steps and the towers."""

from w2s.config.layout_checks import tower_names
from w2s.config.sections import Config, OptimConfig
from w2s.errors import ConfigError


def check_optimizer(config: Config) -> None:
    """Refuse an optimizer, a schedule or frozen layers that cannot be.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ConfigError(f"optim.betas={list(config.optim.betas)} must lie in [0, 1), such as [0.9, 0.98]")
    _check_trust_ratio(config.optim)
    _check_schedule(config.optim, config.train.steps)
    for name in ("vision", "text"):
        _check_frozen(config, name)


def _check_trust_ratio(optim: OptimConfig) -> None:
    if optim.name != "lamb" and optim.trust_1d != "auto":
        raise ConfigError(
            f"optim.trust_1d={optim.trust_1d} does nothing with optim.name={optim.name}: "
            "use optim.name=lamb or optim.trust_1d=auto"
        )
    if optim.trust_ratio is None:
        return
    low, high = optim.trust_ratio
    if optim.name != "lamb":
        raise ConfigError(
            f"optim.trust_ratio=[{low:g}, {high:g}] does nothing with optim.name={optim.name}: "
            "use optim.name=lamb or optim.trust_ratio=null"
        )
    if not 0 < low <= high:
        raise ConfigError(
            f"optim.trust_ratio=[{low:g}, {high:g}] must be two rising numbers above 0, such as [0.01, 10]"
        )


def _check_schedule(optim: OptimConfig, steps: int) -> None:
    if optim.warmup >= steps:
        raise ConfigError(
            f"optim.warmup={optim.warmup} must be less than train.steps={steps}: use optim.warmup={steps // 10}"
        )
    if optim.schedule == "cosine" and optim.cooldown != OptimConfig().cooldown:
        raise ConfigError(
            f"optim.cooldown={optim.cooldown:g} does nothing with optim.schedule=cosine: use optim.schedule=constant"
        )
    if optim.schedule == "constant" and optim.cooldown_start(steps) < optim.warmup:
        raise ConfigError(
            f"optim.cooldown={optim.cooldown:g} of train.steps={steps} begins before the end of "
            f"optim.warmup={optim.warmup}: lower one of them"
        )


def _check_frozen(config: Config, name: str) -> None:
    steps, lowest = (getattr(config.optim, f"{name}_frozen_{what}") for what in ("steps", "layers"))
    layers = getattr(config.model, name).layers
    if steps and name not in tower_names(config):
        raise ConfigError(f"optim.{name}_frozen_steps={steps}: the masked stage has no text tower, leave it out")
    if lowest is not None and not steps:
        raise ConfigError(
            f"optim.{name}_frozen_layers={lowest} does nothing without optim.{name}_frozen_steps: set both"
        )
    if lowest is not None and not 0 <= lowest <= layers:
        raise ConfigError(
            f"optim.{name}_frozen_layers={lowest} must lie between 0 (the embeddings) and "
            f"model.{name}.layers={layers}: leave it out to freeze the whole tower"
        )
