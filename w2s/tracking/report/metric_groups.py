"""Which metrics of a run share a chart; the first charts are those that one looks at first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Baseline(NamedTuple):
    """What metrics are compared with: its label, and the metrics whose colour it has where one of them is drawn."""

    label: str
    beside: Sequence[str] = ()


@dataclass(frozen=True)
class Group:
    """Metrics that belong together.

    Attributes:
        title: of the chart.
        metrics: label by name.
        baselines: by name.
        compared: whether runs are compared by it; otherwise another group says enough.
    """

    title: str
    metrics: Mapping[str, str]
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    compared: bool = True


def _of_teacher(name: str = "") -> list[Group]:
    """The groups of the masked stage's teacher; of one of several under its name."""
    path, title = (f"{name}/", f"{name}: ") if name else ("", "")
    on_test = {"masked": "test, masked patches", "visible": "test, visible patches", "all": "test, all patches"}
    features = {f"{path}test/{kind}_cosine": label for kind, label in {**on_test, "unmasked": "test"}.items()}
    cosine, summary, test_summary = f"{path}cosine", f"{path}summary_cosine", f"{path}test/summary_cosine"
    return [
        Group(
            f"{title}cosine with the teacher's features",
            {cosine: "training", **features},
            {
                f"{path}constant_cosine": Baseline("best constant, training", [cosine]),
                f"{path}test/constant_cosine": Baseline("best constant, test", [*features]),
            },
        ),
        Group(
            f"{title}cosine with the teacher's summary",
            {summary: "training", test_summary: "test"},
            {
                f"{path}summary_constant_cosine": Baseline("best constant, training", [summary]),
                f"{path}test/summary_constant_cosine": Baseline("best constant, test", [test_summary]),
            },
        ),
    ]


def _classified(title: str, kind: str) -> Group:
    others = {"_random/top1": "random weights", "_teacher/top1": "teacher", "/chance_top1": "chance"}
    return Group(title, {f"{kind}/top1": "student"}, {kind + end: Baseline(label) for end, label in others.items()})


def _recalls(title: str, way: str, *, compared: bool = False) -> Group:
    return Group(title, {f"retrieval/{way}_recall_at_{k}": f"at {k}" for k in (1, 5, 10)}, compared=compared)


def _over_ranks(title: str, name: str) -> Group:
    others = {f"ranks/{name}_{which}": f"{which} of the ranks" for which in ("min", "median", "max")}
    return Group(title, {name: "main rank", **others})


GROUPS = (
    Group("loss", {"loss": "training"}),
    Group("loss of distillation", {"distill_loss": "training"}),
    *_of_teacher(),
    Group(
        "zero-shot accuracy",
        {f"zero_shot/top{k}": f"top-{k}" for k in (1, 5)},
        {f"zero_shot/chance_top{k}": Baseline(f"chance, top-{k}", [f"zero_shot/top{k}"]) for k in (1, 5)},
    ),
    Group(
        "mean average precision",
        {"zero_shot/mean_average_precision": "student"},
        {"zero_shot/chance_mean_average_precision": Baseline("chance", ["zero_shot/mean_average_precision"])},
    ),
    _recalls("recall, both ways", "mean", compared=True),
    _recalls("recall, image to text", "image_to_text"),
    _recalls("recall, text to image", "text_to_image"),
    _classified("k-NN top-1", "knn"),
    _classified("linear probe top-1", "linear_probe"),
    Group("gradient norm", {"grad_norm": "before clipping"}),
    Group("learning rate", {"lr": "highest"}),
    Group("logit scale", {"logit_scale": "inverse temperature"}),
    Group("samples a second", {"samples_per_second": "all ranks"}),
    _over_ranks("seconds per step", "seconds_per_step"),
    _over_ranks("share of the time spent waiting for data", "data_wait"),
    Group("memory, GiB", {"memory_gib": "main rank"}),
)

_MARK = "/constant_cosine"
"""What the masked stage reports of every teacher."""


def groups_of(names: Sequence[str]) -> list[Group]:
    """The groups, the sources of the data, and each other metric by itself.

    Args:
        names: metrics of a run.
    """
    teachers = [name.removesuffix(_MARK) for name in names if name.endswith(_MARK) and name.count("/") == 1]
    groups = [*GROUPS, *(group for name in teachers if name != "test" for group in _of_teacher(name))]
    shares = {name: name.split("/")[1] for name in names if name.startswith("source/") and name.endswith("/share")}
    groups.append(Group("share of each source", shares))
    grouped = {name for group in groups for name in (*group.metrics, *group.baselines)}
    return [*groups, *(Group(name, {name: name}) for name in names if name not in grouped)]
