"""How the layers of a tower are split over the stages of a pipeline."""

from collections.abc import Sequence

from w2s.config.batching import num_stages
from w2s.config.sections import ParallelConfig, TextConfig, VisionConfig


def vision_layers(vision: VisionConfig, head_width: int, parallel: ParallelConfig) -> list[int]:
    """Return the layers of the vision tower on each pipeline stage, virtual ones included.

    Args:
        vision: the tower.
        head_width: channels that its head gives.
        parallel: number of stages, and the user's split if there is one.
    """
    layer = 4 * vision.width + 2 * vision.mlp_width + 2 * vision.tokens  # products of a token, over the width
    first, last = 3 * vision.patch_size**2 / layer, (1 + head_width) / layer
    return list(parallel.vision_split) or balanced(vision.layers, num_stages(parallel), first, last)


def text_layers(text: TextConfig, head_width: int, parallel: ParallelConfig) -> list[int]:
    """Return the layers of the text tower on each pipeline stage, as `vision_layers`."""
    layer = 4 * text.width + 2 * text.mlp_width + 2 * text.context_length
    first, last = 1 / layer, (1 + head_width / text.context_length) / layer
    return list(parallel.text_split) or balanced(text.layers, num_stages(parallel), first, last)


def balanced(layers: int, stages: int, first: float, last: float) -> list[int]:
    """Split layers so that the stage with the most work has as little as possible.

    Args:
        layers: layers of the tower, at least as many as stages.
        stages: stages of the pipeline, virtual ones included.
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
