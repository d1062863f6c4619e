"""One sentence that says what the figures of a run mean."""

from collections.abc import Mapping

_PLACES = {
    "masked": "at patches that it does not see",
    "visible": "at the patches that it sees",
    "all": "at all patches",
    "unmasked": "at all patches of whole images",
}
"""Where a masked stage's predictions are, by the name of their cosine."""


def meaning(metrics: Mapping[str, float | None]) -> str:
    """Say what the metrics of a run mean; nothing where they measure no quality.

    Args:
        metrics: by name, the newest value of each.
    """
    known = {name: value for name, value in metrics.items() if value is not None}
    return _of_cosines(known) or _of_clip(known) or _of_neighbours(known)


def _of_cosines(known: Mapping[str, float]) -> str:
    for kind, where in _PLACES.items():
        cosine, constant = known.get(f"test/{kind}_cosine"), known.get("test/constant_cosine")
        if cosine is not None and constant is not None:
            worth = (
                f"; it closes {(cosine - constant) / (1 - constant):.0%} of the gap to 1" if cosine > constant else ""
            )
            return (
                f"On test images the student's prediction {where} has a cosine of {cosine:.3f} with the teacher's "
                f"features, where the best prediction that is the same everywhere has {constant:.3f}{worth}."
            )
    return ""


def _of_clip(known: Mapping[str, float]) -> str:
    for name, top1 in known.items():
        if name == "zero_shot/top1" or name.endswith("/zero_shot/top1"):
            prefix = name.removesuffix("zero_shot/top1")
            chance = known.get(f"{prefix}zero_shot/chance_top1")
            guess = f", where guessing has {chance:.1%}" if chance is not None else ""
            right = f"Without training on its classes it names {top1:.1%} of {_of_set(prefix)} right{guess}."
            return right + _found(known, prefix)
    for name in known:
        if name.endswith("retrieval/mean_recall_at_10"):
            return _found(known, name.removesuffix("retrieval/mean_recall_at_10")).strip()
    return ""


def _found(known: Mapping[str, float], prefix: str) -> str:
    recall = known.get(f"{prefix}retrieval/mean_recall_at_10")
    if recall is None:
        return ""
    searches = f"searches among {_of_set(prefix)} and their captions"
    return f" In {recall:.1%} of the {searches} a right answer is in the first ten."


def _of_set(prefix: str) -> str:
    return f"the test images of {prefix[:-1]}" if prefix else "the test images"


def _of_neighbours(known: Mapping[str, float]) -> str:
    if "knn/top1" not in known:
        return ""
    others = {"knn_random/top1": "random weights", "knn_teacher/top1": "the teacher"}
    beside = [f"{label} {known[name]:.1%}" for name, label in others.items() if name in known]
    return f"Its nearest neighbours name {known['knn/top1']:.1%} of the test images right" + (
        f" ({', '.join(beside)})." if beside else "."
    )
