"""The towers of a stage as the planner sees them: sizes of what a pipeline stage holds, without building it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from w2s.config.sections import Config, VisionConfig
from w2s.config.teacher_losses import Target
from w2s.megatron.model.pipeline_split import text_layers, vision_layers
from w2s.planning.model.flops import (
    TowerFlops,
    frames_per_sample,
    image_flops,
    patch_width,
    student_flops,
    text_flops,
    to_summary,
    tokens_per_image,
)


@dataclass(frozen=True)
class PlannedTower:
    """A tower of a stage. Counts are of elements; names follow Megatron's modules."""

    name: str
    """`vision` or `text`."""
    width: int
    heads: int
    mlp_width: int
    tokens: int
    """Tokens of a sample that go through the layers."""
    sequence: int
    """Tokens that attend to each other: of a clip those of one frame."""
    post_norm: bool
    """Norms after the branches instead of before."""
    norm_vectors: int
    """1 for RMSNorm (weight), 2 for LayerNorm (weight and bias)."""
    qkv_bias: Literal["none", "qv", "qkv"]
    split: tuple[int, ...]
    """Layers of each pipeline stage, virtual ones counted."""
    own_first: tuple[int, ...]
    """Parameters that the first chunk has beside its modules."""
    own_last: tuple[int, ...]
    """Parameters that the last chunk has beside its modules."""
    first: tuple[int, ...]
    """Parameters of the first chunk's modules before the layers."""
    last: tuple[int, ...]
    """Parameters of the last chunk's modules after the layers."""
    logit_parameters: int
    """Parameters of the loss that are trained, in float32, in the last chunk."""
    embedding_elements: int
    """Elements that the embedding keeps of a sample, in the type of the weights: pixels."""
    normed_tokens: int
    """Tokens of a sample that go through the norm after the layers."""
    head_tokens: int
    """Tokens of a sample that go through the head."""
    head_width: int
    """Channels that the head gives."""
    flops: TowerFlops
    """Operations of a sample's forward pass."""
    norm_pre: tuple[int, ...] = ()
    """Parameters of the norm before the layers, in the first chunk."""
    pool: tuple[int, ...] = ()
    """Those of `last` that are of SigLIP's pool."""
    layer_heads: tuple[int, ...] = ()
    """Layers that have a head of their own after them."""
    layer_width: int = 0
    """Channels that such a head gives."""
    summary_width: int = 0
    """Channels of all summary targets, 0 for none."""

    @property
    def layers(self) -> int:
        """Layers over all stages."""
        return sum(self.split)

    def layers_of(self, stage: int, pipeline: int) -> int:
        """Layers on a rank of the pipeline, in all its chunks."""
        return sum(self.split[stage::pipeline])

    def linear_weights(self, tensor: int) -> int:
        """Elements of a layer's four weight matrices on one tensor-parallel rank."""
        return (4 * self.width**2 + 2 * self.width * self.mlp_width) // tensor

    @property
    def layer_elements(self) -> int:
        """Parameters of a layer."""
        return sum(self._layer(1))

    @property
    def patch_row(self) -> int:
        """Pixels of a patch, a row of the patch embedding; 0 without one."""
        return self.first[0] // self.width if self.first else 0

    @property
    def outer_row(self) -> int:
        """Elements of a row that those of all other parameters outside of layers divide: of the positions."""
        return max(self.own_first) if self.first else math.lcm(self.width, self.head_width)

    def chunk(self, stage: int, tensor: int, with_logit_parameters: bool) -> tuple[int, ...]:
        """Sizes of a chunk's parameters on one tensor-parallel rank, in Megatron's order.

        Args:
            stage: pipeline stage, virtual ones counted.
            tensor: tensor-parallel size.
            with_logit_parameters: whether the logit parameters are of the same type as the rest.
        """
        is_first, is_last = stage == 0, stage == len(self.split) - 1
        direct = (self.own_first if is_first else ()) + (self.own_last if is_last else ())
        logit_parameters = (1,) * self.logit_parameters if is_last and with_logit_parameters else ()
        layers = self._layer(tensor) * self.split[stage]
        head = (self.width,) * self.norm_vectors + (self.width * self.layer_width, self.layer_width)
        heads = head * self.layer_heads_of(stage)
        outer = (self.first + self.norm_pre if is_first else ()) + (self.last if is_last else ())
        return direct + logit_parameters + layers + outer + heads

    def layer_heads_of(self, stage: int) -> int:
        """Heads after single layers of a chunk, given its pipeline stage, virtual ones counted."""
        before = sum(self.split[:stage])
        return sum(before <= layer < before + self.split[stage] for layer in self.layer_heads)

    def _layer(self, tensor: int) -> tuple[int, ...]:
        width, hidden = self.width, self.mlp_width // tensor
        norm = (width,) * self.norm_vectors
        bias = {"none": (), "qv": (width // tensor,) * 2, "qkv": (3 * width // tensor,)}[self.qkv_bias]
        attention = (width * width // tensor, width, 3 * width * width // tensor, *bias)
        mlp = (hidden * width, hidden, hidden * width, width)
        return attention + norm + mlp + norm if self.post_norm else norm + attention + norm + mlp


def planned_towers(config: Config, targets: Sequence[Target] = (), layer_width: int = 0) -> tuple[PlannedTower, ...]:
    """Return the towers of a training stage.

    Args:
        config: the stage.
        targets: what is predicted of each teacher (masked stage).
        layer_width: channels of the teacher's layers (masked stage with `mim.layers`).
    """
    if config.stage == "mim":
        return (_student(config, targets, layer_width),)
    return _image_tower(config), _text_tower(config)


def _student(config: Config, targets: Sequence[Target], layer_width: int) -> PlannedTower:
    width, predicted = config.model.vision.width, config.mim.predicted(config.model.vision.patches)
    flops = student_flops(config, targets, layer_width)
    mask_token = () if config.mim.predict == "visible" else (width,)
    heads = tuple(size for target in targets for size in _heads(config, target))
    tower = _vision(config, flops, mask_token, heads, head_tokens=predicted, head_width=patch_width(targets))
    layers = tuple(pair.student for pair in config.mim.layers)
    summaries = [target.summary_width for target in targets if target.summary_width]
    pool, summary = _pool(config) * len(summaries), sum(summaries)
    return replace(tower, pool=pool, layer_heads=layers, layer_width=layer_width, summary_width=summary)


def _heads(config: Config, target: Target) -> tuple[int, ...]:
    """Parameters of what predicts a teacher."""
    patches = (config.model.vision.width * target.width, target.width)
    if not target.summary_width:
        return patches
    to_target = (config.model.embed_dim * width for width in to_summary(config, target.summary_width))
    return (*patches, *_image_head(config), *to_target)


def _image_tower(config: Config) -> PlannedTower:
    head = _image_head(config)
    frames, width = frames_per_sample(config), config.model.embed_dim
    tower = _vision(config, image_flops(config), (), head, head_tokens=frames, head_width=width)
    return replace(tower, pool=_pool(config))


def _image_head(config: Config) -> tuple[int, ...]:
    """Parameters of what makes an embedding: the projection of the class token, or SigLIP's pool."""
    vision, embed = config.model.vision, config.model.embed_dim
    if not vision.class_tokens:
        return _pool(config)
    return (vision.width * embed, embed) if vision.head_bias else (vision.width * embed,)


def _pool(config: Config) -> tuple[int, ...]:
    vision = config.model.vision
    return () if vision.class_tokens else pool_sizes(vision)


def pool_sizes(vision: VisionConfig) -> tuple[int, ...]:
    """Parameters of SigLIP's pool: the probe, Q, K and V, the output, the norm, the MLP."""
    width, hidden = vision.width, vision.mlp_width
    attention = (width, width**2, width, 2 * width**2, 2 * width, width**2, width)
    return (*attention, width, width, width * hidden, hidden, hidden * width, width)


def _vision(
    config: Config,
    flops: TowerFlops,
    mask_token: tuple[int, ...],
    head: tuple[int, ...],
    *,
    head_tokens: int,
    head_width: int,
) -> PlannedTower:
    vision, width = config.model.vision, config.model.vision.width
    vectors = 1 if vision.norm == "rmsnorm" else 2
    sequence, frames = tokens_per_image(config), frames_per_sample(config)
    return PlannedTower(
        name="vision",
        width=width,
        heads=vision.heads,
        mlp_width=vision.mlp_width,
        tokens=frames * sequence,
        sequence=sequence,
        post_norm=vision.norm_placement == "post",
        norm_vectors=vectors,
        qkv_bias=vision.biases,
        split=tuple(vision_layers(vision, head_width, config.parallel)),
        own_first=(*(width,) * vision.class_tokens, vision.tokens * width, *mask_token),
        own_last=(),
        first=(3 * vision.patch_size**2 * width, *((width,) if vision.patch_bias else ())),
        last=(width,) * vectors + head,
        logit_parameters=0,
        embedding_elements=3 * vision.patch_size**2 * frames * (sequence - vision.class_tokens),
        normed_tokens=frames * sequence,
        head_tokens=head_tokens,
        head_width=head_width,
        flops=flops,
        norm_pre=(width,) * vectors if vision.norm_pre else (),
    )


def _text_tower(config: Config) -> PlannedTower:
    text, embed, clip = config.model.text, config.model.embed_dim, config.clip
    return PlannedTower(
        name="text",
        width=text.width,
        heads=text.heads,
        mlp_width=text.mlp_width,
        tokens=text.context_length,
        sequence=text.context_length,
        post_norm=False,
        norm_vectors=2,
        qkv_bias="qkv",
        split=tuple(text_layers(text, embed, config.parallel)),
        own_first=(text.vocab_size * text.width, text.context_length * text.width),
        own_last=(text.width * embed,),
        first=(),
        last=(text.width, text.width),
        logit_parameters=clip.learn_logit_scale + (clip.loss == "sigmoid"),
        embedding_elements=0,
        normed_tokens=1,
        head_tokens=1,
        head_width=embed,
        flops=text_flops(text, embed),
    )
