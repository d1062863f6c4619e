"""What the section `eval` may say in each stage, and who can be registered."""

from w2s.config.sections import Config, EvalConfig
from w2s.config.suites import load_suite
from w2s.errors import ConfigError


def check_evaluation(config: Config) -> None:
    """Refuse an evaluation stage without a model or test sets, or with two ways to say them.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    if config.init.weights == "ema":
        raise ConfigError("init.weights=ema is for stages that train: use eval.weights=ema")
    for key, given in (("train.profile", config.train.profile), ("train.callbacks", config.train.callbacks)):
        if given:
            raise ConfigError(f"{key} is for stages that train: leave it out")
    _check_suite(config.eval)
    if config.eval.linear_probe and not (config.eval.knn_shards or config.eval.suite):
        raise ConfigError("eval.linear_probe=true has nothing to learn from: give labelled images in eval.knn_shards")
    if not config.eval.by_name and not config.eval.suite:
        raise ConfigError("eval.shards is empty: give the test shards, such as eval.shards='test/{00..09}.tar'")
    if config.eval.sets and config.eval.shards:
        raise ConfigError(
            f"eval.shards={config.eval.shards} and eval.sets are both given: name it in eval.sets, or empty one of them"
        )
    if config.init.checkpoint == "none":
        raise ConfigError("init.checkpoint=none leaves nothing to evaluate: give a clip run, or latest")


def check_evaluation_in_training(config: Config) -> None:
    """Refuse what is measured after training alone.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    for key, given in (("eval.sets", config.eval.sets), ("eval.suite", config.eval.suite)):
        if given:
            raise ConfigError(f"{key} is for w2s stage eval: {config.stage} is measured on eval.shards alone")
    if len(config.eval.resizes) > 1:
        raise ConfigError(f"eval.resize={config.eval.resize} is for w2s stage eval: use crop or squash")


def _check_suite(eval_config: EvalConfig) -> None:
    """A suite is all that is measured, and says how."""
    if not eval_config.suite:
        if eval_config.root:
            raise ConfigError(
                f"eval.root={eval_config.root} does nothing without eval.suite: name one, or leave it out"
            )
        return
    load_suite(eval_config.suite)
    if not eval_config.root:
        raise ConfigError(f"eval.suite={eval_config.suite}: give the folder of its sets in eval.root")
    plain = EvalConfig()
    for name in ("shards", "sets", "knn_shards", "templates", "resize", "retrieval", "equal_captions", "class_key"):
        if getattr(eval_config, name) != getattr(plain, name):
            raise ConfigError(
                f"eval.{name}={getattr(eval_config, name)} does nothing with eval.suite={eval_config.suite}, which "
                f"says what is measured and how: leave it at eval.{name}={getattr(plain, name)}"
            )


def check_registered(config: Config) -> None:
    """Refuse a name in the registry that no CLIP can get.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    name = config.tracking.register
    if name and config.stage == "mim":
        raise ConfigError(f"tracking.register={name}: the masked stage makes no CLIP, give it to clip or eval alone")
    if name and not config.tracking.enabled:
        raise ConfigError(f"tracking.register={name} is in MLflow: leave out tracking.enabled=false")
    if set(name) & set("/:"):
        raise ConfigError(f"tracking.register={name}: the name of a registered model has no / and no :, use another")
