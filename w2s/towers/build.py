"""The two towers of a CLIP, with weights drawn from the seed."""

import torch

from w2s.config.sections import Config
from w2s.megatron.initialize import fill
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.initial import text_rule, vision_rule


def build_clip(config: Config, dtype: torch.dtype) -> tuple[ImageTower, TextTower]:
    """Return the image tower and the text tower of `config.model`, on the CPU."""
    model = config.model
    vision = ImageTower(model.vision, model.embed_dim, config.parallel, dtype)
    text = TextTower(model.text, model.embed_dim, config.parallel, dtype)
    fill(vision, vision_rule(model.vision, config.init.post_norm), config.run.seed)
    fill(text, text_rule(model.text, config.clip.logit_scale), config.run.seed)
    return vision, text
