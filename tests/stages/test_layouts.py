"""Both stages give the same numbers in every parallel layout: losses, gradients, weights after LAMB."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.stages.conftest import Material
from tests.stages.layout_steps import Steps, run_alone, run_layouts
from w2s.config.load import load
from w2s.config.sections import ParallelConfig
from w2s.megatron.parallel import process_groups

STEPS = 5
RELATIVE = 1e-5
"""Of losses, and of gradients beside the largest of their tensor: float32 rounds to 6e-8, sums over a width of 32 and
some hundred rows in another order differ by a few of these a layer, and five steps pass them on."""

TENSOR, SEQUENCE, PIPELINE = "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"
FULLY = "parallel.shard=full"
DROP_PATH = "model.vision.drop_path=0.4"
VIRTUAL = "parallel.virtual_pipeline=2"
SPLITS = ["parallel.vision_split=[1,3]", "parallel.text_split=[3,1]"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]

LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {
        "accumulation": ["train.micro_batch=4"],
        "full recompute": ["parallel.recompute=full"],
        "recompute of one layer": ["parallel.recompute=full", "parallel.recompute_layers=1"],
        "selective recompute": ["parallel.recompute=selective"],
    },
    2: {
        "data": ["train.micro_batch=8"],
        "data, overlapped": ["train.micro_batch=4", *OVERLAP],
        "fully sharded": [FULLY, "train.micro_batch=4"],
        "fully sharded, recomputed": [FULLY, "train.micro_batch=8", "parallel.recompute=full"],
        "tensor": [TENSOR],
        "tensor and sequence": [TENSOR, SEQUENCE],
        "pipeline": [PIPELINE, "train.micro_batch=4"],
        "uneven pipeline": [PIPELINE, *SPLITS, "train.micro_batch=4"],
        "virtual pipeline": [PIPELINE, VIRTUAL, "train.micro_batch=4"],
        "virtual pipeline in larger groups": [PIPELINE, VIRTUAL, "train.micro_batch=4", "parallel.micro_batch_group=4"],
        "virtual pipeline, recomputed": [PIPELINE, VIRTUAL, "train.micro_batch=4", "parallel.recompute=full"],
    },
    4: {
        "tensor, pipeline": [TENSOR, PIPELINE, "train.micro_batch=4"],
        "tensor, sequence, virtual pipeline": [TENSOR, SEQUENCE, PIPELINE, VIRTUAL, "train.micro_batch=4"],
        "tensor, data": [TENSOR, SEQUENCE, "train.micro_batch=8"],
        "pipeline, data": [PIPELINE, "train.micro_batch=4"],
        "virtual pipeline, data": [PIPELINE, VIRTUAL, "train.micro_batch=4", *OVERLAP],
    },
    8: {"tensor, pipeline, data": [TENSOR, SEQUENCE, PIPELINE, "train.micro_batch=4", *OVERLAP]},
}


LAYERS = "mim.layers=[{student: 0, teacher: 3}, {student: 1, teacher: 1}, {student: 3, teacher: 5, weight: 0.5}]"
"""In the middle of a pipeline stage, at the end of an early one and of the last one, in turn with the layout."""
DISTILLED = ["clip.distill.source=eva:tiny", "clip.distill.until=0.6", "clip.tile=5"]
"""A CLIP with random weights is the teacher of the first three steps."""
PLAIN = [
    "model.vision.kind=clip", "model.vision.norm=layernorm", "model.vision.norm_placement=pre",
    "model.vision.qkv_bias=true", "model.vision.activation=quick_gelu",
]  # fmt: skip
"""A tower as OpenAI's: a norm before the layers, QuickGELU."""
SIGLIP = [
    "model.vision.kind=siglip", "model.vision.norm=layernorm", "model.vision.norm_placement=pre",
    "model.vision.qkv_bias=true", "model.vision.activation=gelu_tanh", "model.embed_dim=32",
]  # fmt: skip
"""A tower as SigLIP's: no class token, and a pool on the last stage."""

VARIANTS: dict[str, tuple[str, list[str]]] = {
    "mim": ("mim", []),
    "layers": ("mim", ["mim.predict=visible", "mim.loss=mse", LAYERS, "mim.layers_weight=1"]),
    "all": ("mim", ["mim.predict=all", "mim.loss=smooth_l1", "teacher.target_norm=layernorm"]),
    "summary": ("mim", ["mim.summary_weight=0.5", "model.embed_dim=64"]),
    "pooled": ("mim", ["mim.summary_weight=2", "mim.summary=pooled", "mim.predict=visible"]),
    "clip": ("clip", ["init.vision=none"]),
    "mim, CLIP's own tower": ("mim", PLAIN),
    "clip, CLIP's own tower": ("clip", ["init.vision=none", *PLAIN, "model.text.activation=quick_gelu"]),
    "mim, SigLIP's tower": ("mim", [*SIGLIP, "mim.summary_weight=0.5"]),
    "clip, SigLIP's tower": ("clip", ["init.vision=none", *SIGLIP]),
    "mim, drop path": ("mim", [DROP_PATH]),
    "clip, drop path": ("clip", ["init.vision=none", DROP_PATH, "model.vision.norm_placement=pre"]),
    "sigmoid": ("clip", ["init.vision=none", "clip.loss=sigmoid", "clip.logit_scale=10"]),
    "clips": ("clip", ["init.vision=none", DROP_PATH, "data.frames=2", *DISTILLED]),
    "distilled": ("clip", ["init.vision=none", *DISTILLED, "clip.distill.kind=both", "clip.distill.decay=linear"]),
    "distilled sigmoid": (
        "clip",
        ["init.vision=none", "clip.loss=sigmoid", "clip.logit_scale=10", *DISTILLED, "clip.distill.towers=image"],
    ),
}
"""Stage and overrides of what is compared."""

DROPPED = (
    "accumulation",
    "full recompute",
    "selective recompute",
    "data",
    "tensor and sequence",
    "virtual pipeline, recomputed",
    "tensor, sequence, virtual pipeline",
)
ONLY = {
    "mim, SigLIP's tower": (*DROPPED, "fully sharded", "pipeline", "tensor, pipeline, data"),
    "clip, SigLIP's tower": (*DROPPED, "fully sharded", "uneven pipeline", "tensor, pipeline, data"),
    "mim, CLIP's own tower": (*DROPPED, "tensor", "uneven pipeline"),
    "clip, CLIP's own tower": (*DROPPED, "pipeline"),
    "layers": (
        "accumulation",
        "full recompute",
        "recompute of one layer",
        "data, overlapped",
        "tensor and sequence",
        "pipeline",
        "virtual pipeline, recomputed",
        "tensor, sequence, virtual pipeline",
        "tensor, pipeline, data",
    ),
    "all": ("accumulation", "data", "pipeline"),
    "pooled": ("accumulation", "data", "pipeline"),
    "sigmoid": ("accumulation", "data", "pipeline"),
    "clips": ("accumulation", "tensor and sequence", "virtual pipeline", "pipeline, data"),
    "mim, drop path": DROPPED,
    "clip, drop path": DROPPED,
    "distilled sigmoid": ("accumulation", "data", "tensor and sequence", "pipeline, data"),
}
"""Where some variants are compared; the others are everywhere."""
GROUPS = ("virtual pipeline in larger groups", "tensor, sequence, virtual pipeline", "virtual pipeline, data")
BRIEF = {
    "mim": ("full recompute", "data, overlapped", "fully sharded", "tensor", "uneven pipeline", *GROUPS),
    "clip": (
        "accumulation",
        "data",
        "fully sharded, recomputed",
        "tensor and sequence",
        *GROUPS,
        "tensor, data",
    ),
    "layers": ("tensor and sequence", "pipeline"),
    "all": ("pipeline",),
    "summary": ("data", "virtual pipeline"),
    "pooled": ("data",),
    "sigmoid": ("data", "pipeline"),
    "distilled": ("accumulation", "tensor and sequence", "pipeline"),
    "distilled sigmoid": ("pipeline, data",),
    "clips": ("tensor and sequence",),
    "mim, CLIP's own tower": ("uneven pipeline",),
    "clip, CLIP's own tower": ("tensor and sequence",),
    "mim, SigLIP's tower": ("fully sharded", "tensor and sequence"),
    "clip, SigLIP's tower": ("tensor, sequence, virtual pipeline",),
    "mim, drop path": ("data", "tensor, sequence, virtual pipeline"),
    "clip, drop path": ("selective recompute", "virtual pipeline, recomputed"),
}
"""The same where minutes count."""


@pytest.fixture(scope="module")
def common(material: Material) -> list[str]:
    return [
        "model=tiny",
        "model.vision.layers=4",
        "model.text.layers=4",
        "hardware=cpu",
        f"teacher.source=timm:test_vit@{material.teacher}",
        "teacher.target_norm=standardize",
        "data.builtin=none",
        f"data.train={material.train}",
        "data.workers=0",
        "eval.shards=",
        "eval.knn_shards=",
        "train.steps=5",
        "train.global_batch=16",
        "train.micro_batch=16",
        "optim.warmup=1",
        # Adam makes a whole step of a gradient that is all rounding error: the rate keeps it small.
        "optim.lr=1e-4",
        "optim.vision_layer_decay=0.8",
        "init.post_norm=0.5",
        "init.truncated=true",
        "init.text_mlp_bias=uniform",
    ]


def case(name: str, common: Sequence[str], changes: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Stage and overrides of a variant."""
    stage, variant = VARIANTS[name]
    return stage, [*common, *variant, *changes]


@pytest.fixture(scope="module")
def whole(common: list[str]) -> dict[str, Steps]:
    """Every variant on one process in one micro-batch."""
    with process_groups.init_distributed(ParallelConfig(), load("mim", ["hardware=cpu"]).hardware) as ranks:
        return {name: run_alone(load(*case(name, common)), ranks, STEPS) for name in VARIANTS}


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference beside the largest value of its tensor, and where."""
    assert ours.keys() == theirs.keys()
    return max((float((ours[n] - value).abs().max() / value.abs().max()), n) for n, value in theirs.items())


@pytest.mark.parametrize(
    ("ranks", "only", "steps"),
    [
        *(pytest.param(ranks, BRIEF, 3, id=f"{ranks}") for ranks in (1, 2, 4)),
        *(pytest.param(ranks, ONLY, STEPS, id=f"{ranks}, all", marks=pytest.mark.slow) for ranks in LAYOUTS),
    ],
)
def test_every_layout_gives_the_numbers_of_one_process(
    whole: dict[str, Steps], common: list[str], ranks: int, only: dict[str, tuple[str, ...]], steps: int
) -> None:
    cases = {
        f"{variant}: {name}": case(variant, common, changes)
        for name, changes in LAYOUTS[ranks].items()
        for variant in whole
        if name in only.get(variant, LAYOUTS[ranks])
    }
    for name, found in run_layouts(ranks, cases, steps).items():
        expected = whole[name.partition(":")[0]]
        assert found.losses == pytest.approx(expected.losses[:steps], rel=RELATIVE), name
        assert found.distances == pytest.approx(expected.distances[:steps], rel=RELATIVE), name
        error, where = relative_error(found.gradients, expected.gradients)
        assert error < RELATIVE, f"{name}: gradient of {where} is off by {error:.1e}"


def test_layouts_compute_something(whole: dict[str, Steps]) -> None:
    """The comparisons above could not hold by accident: five different losses, no gradient that is all zero."""
    for steps in whole.values():
        assert len(set(steps.losses)) == STEPS
        assert all(float(gradient.abs().max()) > 0 for gradient in steps.gradients.values())
    for name in ("distilled", "distilled sigmoid", "clips"):
        assert len(set(whole[name].distances)) == 3


def test_no_teacher_sees_an_image_twice(whole: dict[str, Steps], common: list[str]) -> None:
    assert whole["mim"].teacher_images == 16
    steps = run_layouts(2, {"mim": ("mim", [*common, TENSOR])}, 1)["mim"]
    assert steps.teacher_images == 8, "the ranks of a model-parallel group share the images"


@pytest.mark.parametrize("trust_1d", [pytest.param("always", marks=pytest.mark.slow), "never"])
def test_sharded_lamb_is_lamb(common: list[str], trust_1d: str) -> None:
    """Weights after five steps, at weight decay 0, with layer decay and a rate a tower."""
    lamb = [
        *case("clip", common)[1],
        "optim.name=lamb",
        f"optim.trust_1d={trust_1d}",
        "optim.lr=1e-3",
        "optim.text_lr=3e-4",
        # K's bias has no effect: its gradient is rounding error, which LAMB would blow up to the size of the others.
        # An eps above the clipped gradients keeps such noise as small as it is beside them.
        "optim.eps=1e-2",
        "optim.clip_grad=0.1",
    ]
    layouts = {"data": ["train.micro_batch=8"], "tensor": [TENSOR], "pipeline": [PIPELINE, "train.micro_batch=8"]}
    adam = ("clip", [*lamb, "optim.name=adamw", "optim.trust_1d=auto"])
    alone, other = run_layouts(1, {"alone": ("clip", lamb), "adam": adam}, STEPS).values()
    split = run_layouts(2, {name: ("clip", [*lamb, *changes]) for name, changes in layouts.items()}, STEPS)
    for name, steps in split.items():
        error, where = relative_error(steps.weights, alone.weights)
        # A bias starts at zero, and is the sum of five updates, each with an error of its own.
        assert error < STEPS * RELATIVE, f"{name}: {where} is off by {error:.1e}"
    assert relative_error(other.weights, alone.weights)[0] > 1e3 * RELATIVE, "without the trust ratio it is another"


def test_bfloat16_gradients_are_close(common: list[str]) -> None:
    """Gradients accumulated in bfloat16, which has eight bits: a different sum, and not a wrong one."""
    bf16 = [*common, "precision.compute=bf16", "train.micro_batch=4"]
    cases = {"fp32": ("mim", bf16), "bf16": ("mim", [*bf16, "precision.gradients=bf16"])}
    results = run_layouts(1, cases, 1)
    name = "vision.lm_head.weight"
    wide, narrow = results["fp32"].gradients[name], results["bf16"].gradients[name]
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert 0 < (wide - narrow).abs().max() / wide.abs().max() < 2**-6
