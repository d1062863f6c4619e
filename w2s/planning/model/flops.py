"""Floating-point operations of the towers, the teacher, the loss and a stage: arithmetic on the configuration.

A multiplication and an addition are two operations. Matrix products, the patch embedding and attention count, as in
`torch.utils.flop_counter`; norms, activations and the optimizer do not. Model FLOPs are what training needs at least: a
backward pass costs two forward passes (of the patch embedding one: pixels get no gradient). Hardware FLOPs are those
that run: also the second forward pass of the contrastive stage, the recomputed layers, the scores that flash attention
recomputes (five products in its backward pass for two in its forward pass), and the tiled loss's fourth product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from w2s.config.batching import num_kept_patches, num_micro_batches, num_passes, views_in_phases
from w2s.config.sections import Config, ParallelConfig, TextConfig, VisionConfig
from w2s.config.teacher_losses import Target
from w2s.megatron.model.pipeline_split import text_layers, vision_layers


@dataclass(frozen=True)
class TowerFlops:
    """Operations of one sample's forward pass through a tower."""

    embedding: float
    """Patches to tokens."""
    linears: float
    """The linears of all layers."""
    attention: float
    """Scores and weighted sums of all layers."""
    head: float
    """The projections after the layers, and after single ones."""

    @property
    def forward(self) -> float:
        """One forward pass."""
        return self.embedding + self.linears + self.attention + self.head

    @property
    def model(self) -> float:
        """One forward and one backward pass, without anything that is computed twice."""
        return 3 * self.forward - self.embedding

    def times(self, count: int) -> "TowerFlops":
        """Those of as many forward passes."""
        return TowerFlops(count * self.embedding, count * self.linears, count * self.attention, count * self.head)

    def hardware(self, recomputed: float, passes: int) -> float:
        """What training runs, with so many forward passes and a fraction of the layers recomputed."""
        again = (passes - 1) * self.forward + recomputed * (self.linears + self.attention)
        return self.model + self.attention / 2 + again


@dataclass(frozen=True)
class Flops:
    """Operations of a part of a step for one sample of the global batch."""

    model: float
    hardware: float


@dataclass(frozen=True)
class StageFlops:
    """Operations of a training step for one sample of the global batch, by part.

    Attributes:
        parts: `student` and `teacher`, or `vision`, `text`, `loss` and, if there is one, `teacher`.
    """

    parts: Mapping[str, Flops]

    @property
    def model(self) -> float:
        """Model FLOPs of all parts."""
        return sum(part.model for part in self.parts.values())

    @property
    def hardware(self) -> float:
        """Hardware FLOPs of all parts."""
        return sum(part.hardware for part in self.parts.values())


def vision_flops(vision: VisionConfig, *, tokens: int, head_tokens: int, head_width: int) -> TowerFlops:
    """Operations of an image: `tokens` (CLS included) go through the layers, `head_tokens` through a linear."""
    linears, attention = _layer(tokens, vision.width, vision.mlp_width)
    return TowerFlops(
        embedding=2 * (tokens - vision.class_tokens) * 3 * vision.patch_size**2 * vision.width,
        linears=vision.layers * linears,
        attention=vision.layers * attention,
        head=2 * head_tokens * vision.width * head_width,
    )


def text_flops(text: TextConfig, head_width: int) -> TowerFlops:
    """Operations of a caption's forward pass; attention counts the whole square of scores, as the counter does."""
    linears, attention = _layer(text.context_length, text.width, text.mlp_width)
    head = 2 * text.width * head_width
    return TowerFlops(embedding=0, linears=text.layers * linears, attention=text.layers * attention, head=head)


def _layer(tokens: int, width: int, mlp_width: int) -> tuple[float, float]:
    """The linears and the attention of one layer."""
    return 2 * tokens * (4 * width**2 + 2 * width * mlp_width), 4 * tokens**2 * width


def teacher_flops(vision: VisionConfig, embed_dim: int) -> float:
    """Operations of an image's forward pass through an EVA tower as teacher, whose projection sees every token."""
    if not vision.class_tokens:
        tower = vision_flops(vision, tokens=vision.tokens, head_tokens=0, head_width=0)
        query = 2 * vision.width**2  # timm computes that of the probe for every image
        return tower.forward + pool_flops(vision, vision.tokens) + query
    return vision_flops(vision, tokens=vision.tokens, head_tokens=vision.tokens, head_width=embed_dim).forward


def pool_flops(vision: VisionConfig, tokens: int) -> float:
    """Operations of SigLIP's pool on the tokens of an image; the probe's Q, one for all images, is left out."""
    width = vision.width
    return 4 * tokens * width**2 + 4 * tokens * width + 2 * width**2 + 4 * width * vision.mlp_width


def loss_flops(config: Config, teacher_width: int = 0) -> Flops:
    """Operations of the contrastive loss for one pair: its logits with a batch, and the gradients that come back.

    Model FLOPs are three products (the logits, and the gradients with respect to images and captions). The softmax
    loss computes the logits of a tile twice, the sigmoid loss once. A teacher's affinities are one more, of its width:
    the gradients could be those of both losses at once. The loss of distillation computes its logits and the student's
    twice, and gradients of its own.
    """
    product = 2 * config.train.global_batch * config.model.embed_dim
    model, hardware = 3 * product, (4 if config.clip.loss == "softmax" else 3) * product
    if teacher_width and config.clip.distill.kind != "feature":
        theirs = 2 * config.train.global_batch * teacher_width
        model, hardware = model + theirs, hardware + 2 * theirs + 4 * product
    return Flops(model, hardware)


def recomputed_layers(parallel: ParallelConfig, layers: int) -> int:
    """Layers of a chunk that the backward pass recomputes."""
    return min(parallel.recompute_layers or layers, layers) if parallel.recompute == "full" else 0


def recomputed_fraction(parallel: ParallelConfig, split: list[int]) -> float:
    """Fraction of a tower's layers that the backward pass computes again; `selective` recomputes no product."""
    return sum(recomputed_layers(parallel, layers) for layers in split) / sum(split)


def tokens_per_image(config: Config) -> int:
    """Tokens of an image in the vision tower while it trains, in the first phase of the data."""
    patches = config.model.vision.patches
    if config.stage == "mim":
        return config.model.vision.class_tokens + config.mim.num_visible(patches)
    _, dropout = views_in_phases(config)[0]
    return config.model.vision.class_tokens + num_kept_patches(patches, dropout)


def frames_per_sample(config: Config) -> int:
    """Images of a sample in the vision tower while it trains, in the first phase of the data."""
    return 1 if config.stage == "mim" else views_in_phases(config)[0][0]


def student_flops(config: Config, targets: Sequence[Target], layer_width: int = 0) -> TowerFlops:
    """Operations of an image's forward pass through the masked stage's student; see `stage_flops`."""
    vision = config.model.vision
    predicted, of_layers = config.mim.predicted(vision.patches), len(config.mim.layers) * layer_width
    width = patch_width(targets) + of_layers
    tower = vision_flops(vision, tokens=tokens_per_image(config), head_tokens=predicted, head_width=width)
    embeds = sum(bool(target.summary_width) for target in targets) * image_head_flops(config)
    onto_targets = sum(sum(to_summary(config, target.summary_width)) for target in targets)
    return replace(tower, head=tower.head + embeds + 2 * config.model.embed_dim * onto_targets)


def patch_width(targets: Sequence[Target]) -> int:
    """Channels of all teachers' features of a patch."""
    return sum(target.width for target in targets)


def to_summary(config: Config, summary_width: int) -> tuple[int, ...]:
    """Channels of the linear from an embedding to a summary target of some channels, which other channels need."""
    return (summary_width,) if summary_width not in (0, config.model.embed_dim) else ()


def image_head_flops(config: Config) -> float:
    """Operations of an image through what makes an embedding of normed tokens: a projection, or SigLIP's pool."""
    vision = config.model.vision
    if not vision.class_tokens:
        return pool_flops(vision, tokens_per_image(config))
    return 2 * vision.width * config.model.embed_dim


def image_flops(config: Config) -> TowerFlops:
    """Operations of an image's, or a whole clip's, forward pass through the contrastive stage's vision tower."""
    image = vision_flops(config.model.vision, tokens=tokens_per_image(config), head_tokens=0, head_width=0)
    return replace(image, head=image_head_flops(config)).times(frames_per_sample(config))


def stage_flops(
    config: Config,
    world_size: int,
    *,
    targets: Sequence[Target] = (),
    layer_width: int = 0,
    teacher: float = 0.0,
) -> StageFlops:
    """Operations of a training step for one sample.

    Args:
        config: the masked or the contrastive stage.
        world_size: ranks in all.
        targets: what is predicted of each teacher; in the contrastive stage the teacher's embeddings, if there is one.
        layer_width: channels of the teacher's layers (masked stage with `mim.layers`).
        teacher: operations of the teachers' forward passes for one sample.
    """
    parallel, model, times = config.parallel, config.model, num_passes(config, num_micro_batches(config, world_size))
    width = model.embed_dim

    def trained(tower: TowerFlops, split: list[int]) -> Flops:
        return Flops(tower.model, tower.hardware(recomputed_fraction(parallel, split), times))

    if config.stage == "mim":
        split = vision_layers(model.vision, patch_width(targets), parallel)
        student = trained(student_flops(config, targets, layer_width), split)
        return StageFlops({"student": student, "teacher": Flops(teacher, teacher)})
    parts = {
        "vision": trained(image_flops(config), vision_layers(model.vision, width, parallel)),
        "text": trained(text_flops(model.text, width), text_layers(model.text, width, parallel)),
        "loss": loss_flops(config, patch_width(targets)),
    }
    return StageFlops(parts | ({"teacher": Flops(teacher, teacher)} if teacher else {}))
