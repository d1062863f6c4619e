"""Bytes of weights, gradients and optimizer states against what Megatron allocates, to the byte."""

from pathlib import Path

import pytest

from tests.planning.memory.measured import SMALL, Place, allocated, average_kept, on_ranks
from tests.stages.shape_images import write_shapes
from w2s.config.batching import model_parallel_size
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.planning.memory.planned_stage import PlannedStage
from w2s.planning.memory.states import States
from w2s.planning.model.towers import planned_towers

TARGET_WIDTH = 1280
"""Channels of the teacher, EfficientNet-Lite0."""

DEEP = ["model.vision.layers=5", "model.text.layers=6", "train.global_batch=12", "train.micro_batch=3"]
PRE_NORM = ["model.vision.norm_placement=pre", "model.vision.norm=layernorm", "model.vision.qkv_bias=true"]
PLAIN = [*PRE_NORM, "model.vision.kind=clip"]
"""As OpenAI's: a norm before the layers too."""
SIGLIP = [*PRE_NORM, "model.vision.kind=siglip", "model.vision.width=32", "model.embed_dim=32"]
"""As SigLIP's: a pool in the place of the projection."""
BF16 = ["precision.compute=bf16"]
WIDE = ["model.vision.layers=2", "model.vision.width=64", "model.vision.mlp_width=160000"]
FULLY = "parallel.shard=full"
BUCKETS = [*BF16, "parallel.overlap_grad_reduce=true", *WIDE]
"""Two layers of 20 million weights: a bucket ends where there are 40 million, before the embedding."""
TWO = {
    "data": [],
    "data, bf16": BF16,
    "data, bf16 gradients": [*BF16, "precision.gradients=bf16"],
    "fully sharded": [FULLY, *PLAIN],
    "fully sharded, bf16": [*BF16, FULLY, "precision.gradients=bf16"],
    "tensor": [*BF16, *PRE_NORM, "parallel.tensor=2"],
    "tensor, sequence": ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch=4"],
    "pipeline": [*PLAIN, "parallel.pipeline=2", "parallel.vision_split=[1,4]"],
    "virtual pipeline": [*BF16, "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
}  # fmt: skip
VIT_WIDTHS = 64, 64
"""Channels of the features of timm's test_vit, and of its layers."""
LAYERS = [
    "mim.layers=[{student: 0, teacher: 3}, {student: 1, teacher: 1}, {student: 4, teacher: 5}]",
    "teacher.source=timm:test_vit", "parallel.pipeline=2", "parallel.vision_split=[2,3]", *BF16,
]  # fmt: skip
POOLED = {"pool": [*SIGLIP, *BF16, "parallel.pipeline=2"], "pool, fully sharded": [*SIGLIP, FULLY]}
THREE = {"data": BF16, "fully sharded": [*BF16, FULLY], "pipeline": ["parallel.pipeline=3"]}
"""Three ranks make buckets end at a multiple of 384."""
SUMMARY = {
    "summary": [*BF16, "mim.summary_weight=1", "model.vision.qkv_bias=true"],
    "summary of its own width": ["mim.summary_weight=1", f"model.embed_dim={TARGET_WIDTH}", "parallel.pipeline=2"],
    "summary and layers": [*LAYERS, "mim.summary_weight=1"],
    "summary of a pool": [*SIGLIP, "mim.summary_weight=1"],
}  # fmt: skip
ALL = {
    ("mim", 2): {**TWO, "buckets": BUCKETS, "visible": [*BF16, "mim.predict=visible"], "layers": LAYERS, **SUMMARY},
    ("clip", 2): TWO | POOLED,
    ("mim", 3): THREE,
    # A logit scale that is not trained cannot be fully sharded.
    ("clip", 3): {name: case for name, case in THREE.items() if name != "fully sharded"},
}
BRIEF = {
    ("mim", 2): ("data, bf16 gradients", "tensor", "virtual pipeline", "buckets", "layers", "summary of a pool"),
    ("clip", 2): ("data", "fully sharded, bf16", "tensor, sequence", "pipeline", "pool, fully sharded"),
    ("mim", 3): ("fully sharded", "pipeline"),
}
"""The same where minutes count."""
SIGMOID = ["clip.loss=sigmoid", "clip.learn_logit_scale=false", "clip.logit_scale=10"]


def _planned(config: Config, place: Place) -> States:
    width, layer_width = VIT_WIDTHS if config.mim.layers else (TARGET_WIDTH, 0)
    towers = planned_towers(config, [config.teacher_losses[0].target(width, width)], layer_width)
    gpus = place.data_size * model_parallel_size(config.parallel)
    return PlannedStage(config, gpus, towers, ()).states(place.stage, place.data_rank)


@pytest.mark.parametrize(
    ("stage", "world_size", "names"),
    [
        *(pytest.param(*where, names, id=" ".join(map(str, where))) for where, names in BRIEF.items()),
        *(
            pytest.param(*where, tuple(cases), id=f"{where[0]} {where[1]}, all", marks=pytest.mark.slow)
            for where, cases in ALL.items()
        ),
    ],
)
def test_states_are_megatrons_to_the_byte(tmp_path: Path, stage: str, world_size: int, names: tuple[str, ...]) -> None:
    shards = f"data.train={write_shapes(tmp_path / 'shards', 1, seed=0)}"
    common = [*SMALL, *DEEP, shards, *(SIGMOID if stage == "clip" and world_size == 3 else [])]
    overrides = {name: [*common, *ALL[stage, world_size][name]] for name in names}
    for name, ranks in on_ranks(world_size, allocated, stage, overrides).items():
        config = load(stage, overrides[name])
        for place, found in ranks:
            planned = _planned(config, place)
            assert (planned.weights, planned.gradients, planned.optimizer) == found, (name, place)


AVERAGED = {
    "data": BF16,
    "fully sharded": [*BF16, FULLY],
    "pipeline": ["parallel.pipeline=2"],
    "none": ["optim.ema=0"],
}


def test_a_moving_average_is_a_ranks_share_of_the_weights_in_float32(tmp_path: Path) -> None:
    shards = f"data.train={write_shapes(tmp_path / 'shards', 1, seed=0)}"
    overrides = {name: [*SMALL, *DEEP, shards, "optim.ema=0.9999", *case] for name, case in AVERAGED.items()}
    for name, ranks in on_ranks(2, average_kept, "mim", overrides).items():
        config = load("mim", overrides[name])
        for place, found in ranks:
            planned = _planned(config, place).average
            # Fully sharded the planner counts the padding, which no parameter has.
            assert 0.97 * planned < found <= planned if name == "fully sharded" else found == planned, name
            assert (found == 0) == (name == "none")
