"""What the figures of a pipeline mean, in few sentences."""

from statistics import mean

from w2s.pipeline.result_tables import by_label
from w2s.pipeline.results import Results

_FIRST = ("mean of a suite", "zero-shot top-1", "mean average precision", "mean recall at 10")
"""Headlines that say most of a CLIP; where there are none, the first that two steps share counts."""


def meaning_of(results: Results) -> str:
    """Say how far each step is ahead of the steps beside it, by the headline that says most."""
    sentences = []
    for step in results.pipeline.steps:
        ours = by_label(results.of(step))
        for other in step.beside:
            theirs = by_label(results.named(other))
            shared = [label for label in ours if label in theirs]
            if shared:
                label = min(shared, key=_rank)
                sentences.append(_sentence(step.name, other, label, ours[label], theirs[label]))
    if not sentences:
        return ""
    runs = max(1, len(results.pipeline.seeds))
    return " ".join([*sentences, "One run each: as small a difference may be chance." if runs == 1 else ""]).strip()


def _rank(label: str) -> int:
    return next((place for place, first in enumerate(_FIRST) if label.startswith(first)), len(_FIRST))


def _sentence(name: str, other: str, label: str, ours: list[float], theirs: list[float]) -> str:
    gap = mean(ours) - mean(theirs)
    place = f"{abs(gap):.4f} {'ahead of' if gap > 0 else 'behind'}" if gap else "level with"
    ahead = sum(a > b for a, b in zip(ours, theirs, strict=True))
    seeds = f", ahead in {ahead} of {len(ours)} seeds" if len(ours) > 1 else ""
    return f"{label}: {name} has {mean(ours):.4f}, {place} {other} ({mean(theirs):.4f}){seeds}."
