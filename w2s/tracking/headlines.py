"""The metrics by which runs are compared, and what each is compared with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Headline:
    """A metric, and the metrics that it is compared with."""

    label: str
    metric: str
    """Name in a run's results; those of a named test set have `SET/` before it."""
    baselines: Mapping[str, str] = field(default_factory=dict)
    """By label."""


@dataclass(frozen=True)
class Reading:
    """A headline's value in the results of a run."""

    label: str
    """The headline's label, with the test set where it is a named one."""
    metric: str
    """The name in the results."""
    value: float
    baselines: Mapping[str, float]
    """Values by label, as far as the run has them."""


HEADLINES = (
    Headline(
        "masked cosine, neighbours",
        "neighbours/masked_cosine",
        {"constant": "neighbours/constant_cosine"},
    ),
    Headline("masked cosine, test", "test/masked_cosine", {"constant": "test/constant_cosine"}),
    Headline("visible cosine, test", "test/visible_cosine", {"constant": "test/constant_cosine"}),
    Headline("cosine of all patches, test", "test/all_cosine", {"constant": "test/constant_cosine"}),
    Headline("unmasked cosine, test", "test/unmasked_cosine", {"constant": "test/constant_cosine"}),
    Headline("summary cosine, test", "test/summary_cosine", {"constant": "test/summary_constant_cosine"}),
    Headline(
        "k-NN top-1",
        "knn/top1",
        {"random": "knn_random/top1", "teacher": "knn_teacher/top1", "chance": "knn/chance_top1"},
    ),
    Headline(
        "linear probe top-1",
        "linear_probe/top1",
        {"random": "linear_probe_random/top1", "teacher": "linear_probe_teacher/top1"},
    ),
    Headline("mean of a suite", "mean"),
    Headline("zero-shot top-1", "zero_shot/top1", {"chance": "zero_shot/chance_top1"}),
    Headline("zero-shot top-5", "zero_shot/top5", {"chance": "zero_shot/chance_top5"}),
    Headline(
        "mean average precision",
        "zero_shot/mean_average_precision",
        {"chance": "zero_shot/chance_mean_average_precision"},
    ),
    Headline("image to text, recall at 5", "retrieval/image_to_text_recall_at_5"),
    Headline("text to image, recall at 5", "retrieval/text_to_image_recall_at_5"),
    Headline("mean recall at 10", "retrieval/mean_recall_at_10"),
)


def readings(metrics: Mapping[str, float]) -> Iterator[Reading]:
    """The headlines that are among the metrics of a run, once for each test set that has them."""
    for headline in HEADLINES:
        for name, value in metrics.items():
            if name == headline.metric or name.endswith(f"/{headline.metric}"):
                prefix = name.removesuffix(headline.metric)
                baselines = {
                    label: metrics[prefix + key] for label, key in headline.baselines.items() if prefix + key in metrics
                }
                label = f"{headline.label}, {prefix[:-1]}" if prefix else headline.label
                yield Reading(label, name, value, baselines)
