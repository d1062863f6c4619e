"""What a model is made of, without its weights."""

import torch

from w2s.config.sections import ModelConfig, ParallelConfig
from w2s.config.teacher_losses import Target
from w2s.megatron.checkpoint import state
from w2s.megatron.model.tower import Tower
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.masked_student import MaskedStudent


def model_shapes(
    model: ModelConfig, target: Target | None = None, logit_bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a CLIP by its name in our checkpoints; needs Megatron's groups.

    With a `target` the heads of a masked student come in addition.
    """
    alone, kind = ParallelConfig(), torch.float32
    with torch.device("meta"):
        towers: list[tuple[str, Tower]] = [
            ("vision", ImageTower(model.vision, model.embed_dim, alone, kind)),
            ("text", TextTower(model.text, model.embed_dim, alone, kind, logit_bias=logit_bias)),
        ]
        if target:
            student = MaskedStudent(model.vision, [target], alone, kind, embed_dim=model.embed_dim)
            towers.append(("vision", student))
        shapes = [state.tower_shapes({name: ShardedTower([tower], [tower])}) for name, tower in towers]
    return {name: shape for of_tower in shapes for name, shape in of_tower.items()}
