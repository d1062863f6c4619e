"""What a model is made of, without its weights."""

import torch

from w2s.config.sections import ModelConfig, ParallelConfig
from w2s.megatron import state
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.masked import MaskedStudent


def model_shapes(model: ModelConfig, target_width: int | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a CLIP by its name in our checkpoints; needs Megatron's groups.

    Args:
        model: the two towers.
        target_width: width of a masked student's teacher, whose head comes in addition; None for a CLIP alone.
    """
    alone, kind = ParallelConfig(), torch.float32
    with torch.device("meta"):
        vision = ImageTower(model.vision, model.embed_dim, alone, kind)
        text = TextTower(model.text, model.embed_dim, alone, kind)
        shapes = state.tower_shapes({"vision": vision, "text": text})
        if target_width is not None:
            shapes |= state.tower_shapes({"vision": MaskedStudent(model.vision, target_width, alone, kind)})
    return shapes
