"""The towers of a stage with weights drawn from the seed: this rank's chunks of them."""

from collections.abc import Callable, Mapping, Sequence

import torch

from w2s.config.sections import Config
from w2s.config.teacher_losses import Target
from w2s.megatron.fp8.linears import linears_of
from w2s.megatron.model.initialize import Init, init_parameters
from w2s.megatron.parallel.sharded import ShardedTower, shard
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.initial import text_rule, vision_rule
from w2s.towers.masked_student import MaskedStudent


def build_student(
    config: Config,
    targets: Sequence[Target],
    dtype: torch.dtype,
    device: torch.device,
    layer_widths: Mapping[int, int] | None = None,
) -> ShardedTower[MaskedStudent]:
    """Return the masked stage's student: `config.model.vision` with heads for its targets.

    `layer_widths` are the channels that heads after single layers give, by the layer's index.
    """
    vision, linears = config.model.vision, linears_of(config, "vision")
    drop_masked = config.mim.predict == "visible"

    def chunk(index: int) -> MaskedStudent:
        student = MaskedStudent(
            vision,
            targets,
            config.parallel,
            dtype,
            index,
            linears,
            drop_masked,
            layer_widths,
            embed_dim=config.model.embed_dim,
        )
        init_parameters(student, _vision_start(config), config.run.seed)
        return student

    return shard(chunk, config.parallel, device)


def build_clip(
    config: Config, dtype: torch.dtype, device: torch.device
) -> tuple[ShardedTower[ImageTower], ShardedTower[TextTower]]:
    """Return the image tower and the text tower of `config.model`."""
    model, seed = config.model, config.run.seed
    seeing, reading = linears_of(config, "vision"), linears_of(config, "text")

    def vision_chunk(index: int) -> ImageTower:
        tower = ImageTower(model.vision, model.embed_dim, config.parallel, dtype, index, seeing)
        init_parameters(tower, _vision_start(config), seed)
        return tower

    def text_chunk(index: int) -> TextTower:
        has_bias = config.clip.loss == "sigmoid"
        tower = TextTower(model.text, model.embed_dim, config.parallel, dtype, index, has_bias, reading)
        scalars = config.clip.drawn_logit_scale, config.clip.logit_bias
        init_parameters(tower, text_rule(model.text, *scalars, config.init.text_mlp_bias), seed)
        if tower.last:
            tower.logit_scale.requires_grad_(config.clip.learn_logit_scale)
        return tower

    return shard(vision_chunk, config.parallel, device), shard(text_chunk, config.parallel, device)


def _vision_start(config: Config) -> Callable[[str], Init]:
    return vision_rule(config.model.vision, config.init.post_norm, config.init.std, config.init.truncated)
