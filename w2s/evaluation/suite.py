"""Suites of test sets: which of them are there, how each is measured, and the table of a paper that they fill."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from w2s.config.sections import Config, DataConfig, EvalConfig, Resize
from w2s.config.suites import Column, Mean, Suite, SuiteSet, columns
from w2s.errors import DataError
from w2s.evaluation.dataset import PROMPTS

Row = list[str | None]


def find_sets(name: str, suite: Suite, root: str) -> dict[str, str]:
    """Return the folders with the test shards of a suite's sets that are below `root`, by the sets' names.

    Raises:
        DataError: none is there, or one lacks its prompts.
    """
    if not Path(root).expanduser().is_dir():
        raise DataError(f"eval.root={root} is not a folder: give the one that has a folder for each set")
    there = {one.name: one for one in suite.sets if (folder_of(one, root) / "test").is_dir()}
    if not there:
        first = folder_of(suite.sets[0], root) / "test"
        raise DataError(f"eval.root={root} has no set of eval.suite={name}: there is no {first}")
    for one in there.values():
        prompts = [folder_of(one, root) / part / PROMPTS for part in ("", "test")]
        if one.metric != "recall" and one.prompts == "own" and not any(path.is_file() for path in prompts):
            raise DataError(
                f"eval.suite={name}: {one.name} has no {prompts[0]}: write it, a prompt with {{c}} in the place of the "
                "class name a line, or let `w2s data make --layout clip_benchmark --like SET` do so"
            )
    return {set_name: str(folder_of(one, root) / "test") for set_name, one in there.items()}


def folder_of(one: SuiteSet, root: str) -> Path:
    """Return the folder of a set, whether it is there or not."""
    return Path(root).expanduser() / (one.folder or one.name)


def as_measured(config: Config, suite: Suite, one: SuiteSet, shards: str) -> Config:
    """Return the configuration by which a set is measured: the suite's prompts and resizing, CLIP_benchmark's layout.

    With `eval.linear_probe` k-NN and the probe learn from the set's own training images, where it has some and each has
    one class.
    """
    training = Path(shards).parent / "train"
    learns = config.eval.linear_probe and one.metric not in ("recall", "mean_average_precision")
    rules = replace(
        config.eval,
        suite="",
        sets={one.name: shards},
        class_key=EvalConfig().class_key,
        templates="none" if one.metric == "recall" else one.prompts,
        resize=suite.resize,
        retrieval=one.metric == "recall",
        equal_captions="wrong",
        knn_shards=str(training) if learns and training.is_dir() else "",
    )
    keys = DataConfig()
    data = replace(config.data, image_key=keys.image_key, caption_key=keys.caption_key)
    return replace(config, eval=rules, data=data)


def score(one: SuiteSet, suite: Suite, metrics: Mapping[str, float]) -> float:
    """Return what counts of a set: the mean of its columns.

    Raises:
        DataError: its samples have no labels or captions for its metric.
    """
    values = [value for column in columns(suite) if column.of == one and (value := _value(column, metrics)) is not None]
    if not values:
        raise DataError(
            f"{one.name} has no {one.metric}: its samples lack the classes or captions, see docs/evaluation.md"
        )
    return fmean(values)


def differences(suite: Suite, sizes: Mapping[str, int]) -> list[str]:
    """Say, a line each, which sets are missing and which have another number of images (`sizes`) than they should."""
    missing = [one.name for one in suite.sets if one.name not in sizes]
    lines = [f"{len(missing)} of {len(suite.sets)} sets are missing: {', '.join(missing)}"] if missing else []
    return lines + [
        f"{one.name} has {sizes[one.name]} images, not {one.images}: its figures are not comparable"
        for one in suite.sets
        if one.name in sizes and one.images not in (0, sizes[one.name])
    ]


def means(suite: Suite, measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the means of a suite all of whose columns have been measured."""
    heads = columns(suite)
    values = [_value(column, measured.get(column.of.name, {})) for column in heads]
    averages = {mean.name: _mean(mean, heads, values) for mean in suite.means}
    return {name: value for name, value in averages.items() if value is not None}


def table(
    suite: Suite, model: str, measured: Mapping[str, Mapping[str, float]], resized: Mapping[str, Resize]
) -> tuple[list[str], list[Row]]:
    """Return the heading and the rows of a suite's table, in percent: first the model's, then those published.

    Args:
        suite: what the table has.
        model: name of the measured model.
        measured: metrics by the name of the set; cells and means of what is missing are empty.
        resized: how the images of each set became square, which is told where it differs from set to set.
    """
    heads = columns(suite)
    fractions = [_value(column, measured.get(column.of.name, {})) for column in heads]
    models: dict[str, Sequence[float | None]] = {
        model: [None if value is None else 100 * value for value in fractions],
        **suite.published,
    }
    rows: list[Row] = []
    for name, values in models.items():
        averages = [_mean(mean, heads, values) for mean in suite.means]
        rows.append([name, *(None if value is None else f"{value:.1f}" for value in [*values, *averages])])
    if suite.resize == "better":
        rows.insert(1, ["resized by", *(resized.get(column.of.name) for column in heads), *[None] * len(suite.means)])
    return ["model", *(column.title for column in heads), *(mean.title for mean in suite.means)], rows


def _value(column: Column, metrics: Mapping[str, float]) -> float | None:
    if any(name not in metrics for name in column.metrics):
        return None
    return fmean(metrics[name] for name in column.metrics)


def _mean(mean: Mean, heads: Sequence[Column], values: Sequence[float | None]) -> float | None:
    """The mean of the columns of its sets; None where one is empty."""
    chosen = [value for column, value in zip(heads, values, strict=True) if not mean.of or column.of.name in mean.of]
    return None if None in chosen else fmean(value for value in chosen if value is not None)
