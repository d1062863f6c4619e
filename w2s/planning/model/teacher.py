"""What a frozen teacher costs: bytes on every rank and operations per image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import mul
from pathlib import Path
from typing import Any, Literal

from w2s.config.batching import model_parallel_size, samples_per_rank
from w2s.config.load import model_from, named_model
from w2s.config.sections import Config, ModelConfig, TeacherConfig, VisionConfig
from w2s.config.teacher_checks import check_teacher_widths
from w2s.config.teacher_losses import Target
from w2s.planning.model.flops import StageFlops, frames_per_sample, stage_flops, teacher_flops, text_flops
from w2s.planning.model.towers import pool_sizes
from w2s.teachers.distillation.load_balance import balance
from w2s.teachers.distillation.teacher_draw import TeacherDraw

_MAPS = 16
"""Feature maps of the input's size, in float32, that a network which is not an EVA tower is taken to need at once."""


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher, in one piece."""

    width: int
    """Channels of a feature."""
    layer_width: int
    """Channels of the tokens after a layer; 0 where there are no layers to ask for."""
    summary_width: int
    """Channels of the image embedding or pooled feature."""
    image_size: int
    """Side of its input in pixels."""
    weights: int
    """Bytes of its weights and buffers."""
    working: int
    """Bytes of the largest temporaries of its forward pass, for one image; an estimate."""
    flops: float
    """Operations of its forward pass for one image, and its caption where it reads captions."""
    text_weights: int = 0
    """Bytes of its text tower, which every rank holds whole."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of its forward pass."""
    share: float = 1.0
    """Fraction of the samples that have it, as it is to be expected of a run."""


_NOTHING = PlannedTeacher(width=0, layer_width=0, summary_width=0, image_size=0, weights=0, working=0, flops=0.0)


def predicted(config: Config, teachers: Sequence[PlannedTeacher]) -> dict[str, Any]:
    """What a student predicts of its teachers, as `stage_flops` and `planned_towers` call it.

    Of a teacher of the contrastive stage it is the width of the embeddings. Without teachers it is nothing, as for the
    published runs of other programs.
    """
    if config.stage == "mim":
        pairs = zip(config.teacher_losses[: len(teachers)], teachers, strict=True)
        targets = [teacher_loss.target(each.width, each.summary_width) for teacher_loss, each in pairs]
    else:
        targets = [Target(each.width) for each in teachers]
    return {"targets": targets, "layer_width": teachers[0].layer_width if teachers else 0}


def flops_with_teachers(config: Config, world_size: int, teachers: Sequence[PlannedTeacher]) -> StageFlops:
    """Return the operations of a training step with its teachers, for one sample."""
    return stage_flops(config, world_size, **predicted(config, teachers), teacher=sample_flops(teachers))


def sample_flops(teachers: Sequence[PlannedTeacher]) -> float:
    """Return the operations of the teachers' forward passes for a sample, in the mean over a run."""
    return sum(each.share * each.flops for each in teachers)


def drawn(teachers: Sequence[PlannedTeacher]) -> bool:
    """Whether a sample may lack a teacher, so that a group's images are spread over its ranks (`load_balance.py`)."""
    return any(each.share < 1 for each in teachers)


def images_of_rank(config: Config, teachers: Sequence[PlannedTeacher], world_size: int) -> Sequence[float]:
    """Return how many images each teacher embeds in a step on the rank of a model-parallel group that has most work.

    Where samples may lack teachers it is the spread of as many images as are to be expected of a group.
    """
    samples, ranks = samples_per_rank(config, world_size), model_parallel_size(config.parallel)
    if not drawn(teachers) or ranks == 1:
        return [each.share * samples for each in teachers]
    counts = tuple(round(each.share * samples * ranks) for each in teachers)
    return _largest_share(tuple(each.flops for each in teachers), counts, ranks)


@cache  # a plan goes through many layouts with groups of a size
def _largest_share(costs: tuple[float, ...], counts: tuple[int, ...], ranks: int) -> Sequence[int]:
    return max(balance(costs, counts, ranks), key=lambda images: sum(map(mul, images, costs)))


def planned_teachers(config: Config, models: Mapping[str, ModelConfig] | None = None) -> tuple[PlannedTeacher, ...]:
    """Return the teachers of a stage, as far as they are needed; none where there are none.

    EVA towers are worked out; any other network is built, which takes seconds.

    Args:
        config: the stage.
        models: by source, those of teachers `w2s:RUN` whose runs are still to come; without them the runs say it.

    Raises:
        ConfigError: the source or the model is unknown.
        CheckpointError: a run that does not exist, or is damaged.
    """
    known = models or {}
    if config.stage == "mim":
        teachers = [_image_side(config, teacher, known.get(teacher.source)) for teacher in config.stage_teachers]
        draw = TeacherDraw.of(config)
        shares = draw.shares() if draw else [1.0] * len(teachers)
        return tuple(replace(each, share=share) for each, share in zip(teachers, shares, strict=True))
    return tuple(_beside_pairs(config, teacher, known.get(teacher.source)) for teacher in config.stage_teachers)


def _beside_pairs(config: Config, teacher: TeacherConfig, model: ModelConfig | None) -> PlannedTeacher:
    """The teacher of the contrastive stage."""
    sides, frames = config.clip.distill.teacher_sides, frames_per_sample(config)
    image_side = _image_side(config, teacher, model) if "image" in sides else _NOTHING
    text_side = _text_side(config, teacher, model) if "text" in sides else _NOTHING
    check_teacher_widths(config, [width for width in (image_side.summary_width, text_side.width) if width])
    return replace(
        image_side,
        width=image_side.summary_width or text_side.width,
        working=max(frames * image_side.working, text_side.working),
        flops=frames * image_side.flops + text_side.flops,
        text_weights=text_side.text_weights,
    )


def _image_side(config: Config, teacher: TeacherConfig, model: ModelConfig | None) -> PlannedTeacher:
    kind, _, rest = teacher.source.partition(":")
    if kind == "eva":
        return _eva(named_model(rest.partition("@")[0]), teacher)
    if kind == "w2s":
        return _eva(model or _model_of_run(rest, Path(config.run.root).expanduser()), teacher)
    return _counted(config, teacher)


def _text_side(config: Config, teacher: TeacherConfig, model: ModelConfig | None) -> PlannedTeacher:
    """The text tower, whose weights are float32."""
    from w2s.teachers.text import text_shape

    if teacher.source.startswith(("eva:", "open_clip:")):
        teacher = replace(teacher, source=teacher.source.partition("@")[0])  # known without the file
    text, width = (model.text, model.embed_dim) if model else text_shape(teacher, config.run.root)
    read = replace(text, context_length=min(text.context_length, config.model.text.context_length))
    layer = 4 * text.width**2 + 2 * text.width * text.mlp_width + 9 * text.width + text.mlp_width
    tokens = text.vocab_size + text.context_length
    return replace(
        _NOTHING,
        width=width,
        working=read.context_length * 4 * (2 * text.mlp_width + 3 * text.width),
        flops=text_flops(read, width).forward,
        text_weights=4 * (text.layers * layer + text.width * (tokens + 2 + width) + read.context_length**2 + 1),
    )


def _eva(model: ModelConfig, teacher: TeacherConfig) -> PlannedTeacher:
    vision = replace(model.vision, image_size=teacher.image_size or model.vision.image_size)
    narrow = 2 if teacher.precision == "bf16" else 4
    tokens = vision.tokens
    return PlannedTeacher(
        width=model.embed_dim,
        layer_width=vision.width,
        summary_width=model.embed_dim,
        image_size=vision.image_size,
        weights=_eva_bytes(vision, model.embed_dim, narrow),
        # The MLP's hidden activations before and after the GELU, and three of the residual stream's in float32.
        working=tokens * (2 * narrow * vision.mlp_width + 3 * 4 * vision.width),
        flops=teacher_flops(vision, model.embed_dim),
        precision=teacher.precision,
    )


def _eva_bytes(vision: VisionConfig, embed_dim: int, narrow: int) -> int:
    """Bytes of a tower of our kinds: linears and patch embedding in the teacher's precision, all else in float32."""
    width, hidden = vision.width, vision.mlp_width
    vectors = 1 if vision.norm == "rmsnorm" else 2
    linears = vision.layers * (4 * width**2 + width + 2 * width * hidden + hidden + width)
    patches = 3 * vision.patch_size**2 * width + (width if vision.patch_bias else 0)
    head = width * embed_dim + (embed_dim if vision.head_bias else 0)
    norms = (2 * vision.layers + (2 if vision.norm_pre else 1)) * vectors * width
    before = (vision.class_tokens + vision.tokens) * width  # class token and positions
    # Where Q and V alone have a bias, it is apart from the linear, and a buffer of zeros stands for K's.
    biases = vision.layers * 3 * width if vision.qkv_bias else 0
    whole, apart = (0, biases) if vision.biases == "qv" else (biases, 0)
    pool = 0
    if not vision.class_tokens:
        pool = 3 * width  # the probe, and weight and bias of a norm
        head = sum(pool_sizes(vision)) - pool
    return narrow * (linears + patches + head + whole) + 4 * (norms + apart + before + pool)


def _model_of_run(name: str, root: Path) -> ModelConfig:
    from w2s.checkpoint.find import find_any
    from w2s.checkpoint.own.checkpoint_folders import read_meta

    return model_from(read_meta(find_any(name, root, key="teacher.source")).config)


def _counted(config: Config, teacher: TeacherConfig) -> PlannedTeacher:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from w2s.teachers.base import Teacher
    from w2s.teachers.build import without_weights

    grid = config.model.vision.grid
    network = without_weights(teacher, grid=grid)
    side = network.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, side, side, device="meta"))
    frozen = Teacher(network, grid=grid, precision=teacher.precision)
    tensors = [*frozen.parameters(), *frozen.buffers()]
    return PlannedTeacher(
        width=network.width,
        layer_width=network.layer_width,
        summary_width=network.summary_width,
        image_size=side,
        weights=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        working=_MAPS * 3 * side**2 * 4,
        flops=float(counter.get_total_flops()),
        precision=teacher.precision,
    )
