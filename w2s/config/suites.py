"""What a file of `configs/suite` says: test sets that are measured together, each by its rules."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from w2s.config.fields import nearest, refuse_unknown
from w2s.config.load import read_document
from w2s.config.rules import is_name
from w2s.errors import ConfigError

Metric = Literal["top1", "mean_per_class", "mean_of_top1_and_top5", "mean_average_precision", "recall"]

_ACCURACIES: dict[Metric, tuple[str, ...]] = {
    "top1": ("zero_shot/top1",),
    "mean_per_class": ("zero_shot/mean_per_class",),
    "mean_of_top1_and_top5": ("zero_shot/top1", "zero_shot/top5"),
    "mean_average_precision": ("zero_shot/mean_average_precision",),
}
_WAYS = {"text": "image_to_text", "image": "text_to_image"}
"""What is retrieved, and the way there."""


@dataclass(frozen=True, kw_only=True)
class SuiteSet:
    """A test set of a suite."""

    name: str
    """Name of its metrics: NAME/METRIC."""
    title: str = ""
    """Heading of its column; empty takes the name."""
    folder: str = ""
    """Its folder below `eval.root`, with `test/` and, for k-NN and the linear probe, `train/`; empty takes the name."""
    images: int = 0
    """Images that it should have; 0 takes any number."""
    metric: Metric = "top1"
    """What is measured; `recall` at 1, 5 and 10 both ways, with each caption belonging to its own image alone."""
    prompts: Literal["none", "simple", "openai", "own"] = "own"
    """Prompts around a class name, as `eval.templates`."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over columns of the table."""

    name: str
    """Name of the metric: SUITE/NAME."""
    title: str
    """Heading of its column."""
    of: list[str] = field(default_factory=list)
    """Names of the sets whose columns are averaged; empty takes all."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A file of `configs/suite`."""

    title: str
    """Heading of the table."""
    resize: Literal["crop", "squash", "better"] = "crop"
    """How images become square, as `eval.resize`."""
    sets: list[SuiteSet]
    """The test sets in the order of the columns; retrieval of texts from all sets comes before that of images."""
    means: list[Mean] = field(default_factory=list)
    """Means behind them."""
    published: dict[str, list[float]] = field(default_factory=dict)
    """What others have published, in percent: by model, a number for each column without the means."""


@dataclass(frozen=True)
class Column:
    """A column of a suite's table: a metric of a set, or the mean of some."""

    title: str
    of: SuiteSet
    metrics: tuple[str, ...]


def load_suite(name: str) -> Suite:
    """Read a suite.

    Args:
        name: a file of `configs/suite`, or a path that ends in `.yaml`.

    Raises:
        ConfigError: there is none of this name, or the file is not of this form.
    """
    document = read_document("suite", name)
    refuse_unknown(document, Suite, f"eval.suite={name}")
    for entry in document.get("sets") or []:
        refuse_unknown(entry, SuiteSet, f"eval.suite={name}")
    try:
        suite = cast(Suite, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Suite), document)))
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"eval.suite={name}: {error.full_key}: {reason}; see configs/suite/retrieval.yaml") from error
    for mistake in _mistakes(suite):
        raise ConfigError(f"eval.suite={name}: {mistake}")
    return suite


def columns(suite: Suite) -> list[Column]:
    """The columns of a suite's table, without its means."""
    single = [
        Column(one.title or one.name, one, _ACCURACIES[one.metric]) for one in suite.sets if one.metric != "recall"
    ]
    retrieved = [one for one in suite.sets if one.metric == "recall"]
    return single + [
        Column(f"{one.title or one.name} {what} R@{k}", one, (f"retrieval/{way}_recall_at_{k}",))
        for what, way in _WAYS.items()
        for one in retrieved
        for k in (1, 5, 10)
    ]


def _mistakes(suite: Suite) -> Iterator[str]:
    names = [one.name for one in suite.sets]
    if not names or len(set(names)) < len(names):
        yield f"sets are named {names}: give at least one, each with a name of its own"
    for name in names:
        if not is_name(name):
            yield f"'{name}' is not a name of a test set: use letters, digits, _ and -"
    for mean in suite.means:
        for name in set(mean.of) - set(names):
            yield f"means: there is no set {name}: did you mean {nearest(name, names)}?"
    for model, figures in suite.published.items():
        if len(figures) != len(columns(suite)):
            yield f"published: {model} has {len(figures)} numbers for {len(columns(suite))} columns: give one for each"
