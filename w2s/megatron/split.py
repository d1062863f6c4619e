"""How the layers of a tower are split over the stages of a pipeline."""

from collections.abc import Sequence


def balanced(layers: int, stages: int, first: float, last: float) -> list[int]:
    """Split layers so that the stage with the most work has as little as possible.

    Args:
        layers: layers of the tower, at least as many as stages.
        stages: stages of the pipeline, virtual ones counted.
        first: work of the first stage beside its layers, in units of a layer's.
        last: work of the last stage beside its layers.

    Returns:
        Layers of each stage, at least one.
    """
    counts = [1] * stages
    work = [1.0] * stages
    work[0] += first
    work[-1] += last
    for _ in range(layers - stages):
        stage = work.index(min(work))
        counts[stage] += 1
        work[stage] += 1
    return counts


def pipeline_layout(split: Sequence[int]) -> list[list[str]]:
    """Say a split in Megatron's words: the kinds of layers of every stage."""
    layout = [["decoder"] * count for count in split]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
