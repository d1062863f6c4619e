"""Parallel layouts that cannot work, or would do nothing, are refused in one line that names what is legal."""

import pytest

from tests.config.refusals import accepts, refusal

BIG = [
    "model=eva_18b",
    "hardware=cpu",
    "data.lanes=64",
    "data.train=x",
    "train.global_batch=256",
    "mim.masked_patches=105",
]
"""40 vision heads and 20 text heads, 48 and 32 layers."""


def test_legal_layouts_pass() -> None:
    assert accepts("mim", *BIG, "parallel.tensor=8", "parallel.sequence=true", "train.micro_batch=64", ranks=8)
    assert accepts("clip", *BIG, "parallel.tensor=4", "parallel.pipeline=2", "train.micro_batch=16", ranks=8)
    interleaved = ["parallel.pipeline=4", "parallel.virtual_pipeline=3", "train.micro_batch=16"]
    assert accepts("mim", *BIG, *interleaved, ranks=8)
    assert accepts("mim", *BIG, "parallel.pipeline=2", "parallel.vision_split=[20,28]", "train.micro_batch=16", ranks=2)


def test_text_heads_do_not_divide_by_eight() -> None:
    message = refusal("clip", *BIG, "parallel.tensor=8", ranks=8)
    assert message == (
        "parallel.tensor=8 does not divide model.text.heads=20: use parallel.tensor=1, 2, 4, 5, 10 or 20"
    )


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (
            16,
            ["parallel.tensor=16"],
            "parallel.tensor=16 does not divide model.vision.heads=40: use parallel.tensor=1, 2",
        ),
        (
            3,
            ["parallel.tensor=3", "model.vision.heads=3", "model.vision.width=96"],
            "does not divide model.vision.mlp_",
        ),
        (3, ["parallel.tensor=2"], "parallel.tensor=2 x parallel.pipeline=1 needs a multiple of 2 ranks, there are 3"),
        (
            1,
            ["parallel.pipeline=2"],
            "parallel.tensor=1 x parallel.pipeline=2 needs a multiple of 2 ranks, there are 1",
        ),
        (1, ["parallel.tensor=0"], "parallel.tensor=0 must be at least 1"),
        (64, ["parallel.pipeline=64"], "parallel.pipeline=64 x parallel.virtual_pipeline=1 makes 64 stages of "),
        (
            2,
            ["parallel.pipeline=2", "parallel.vision_split=[20,20]"],
            "parallel.vision_split=[20, 20] must have 2 whole",
        ),
        (2, ["parallel.pipeline=2", "parallel.vision_split=[48]"], "use such as [24, 24]"),
        (2, ["parallel.pipeline=2", "train.micro_batch=256"], "makes 1 micro-batches of the 256 samples"),
        (
            2,
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch=12", "train.micro_batch=4"],
            "makes 3 micro-batches of the 12 samples of a data-parallel rank, which do not fill 2 pipeline stages: "
            "use train.micro_batch=1, 2, 3 or 6",
        ),
        (
            2,
            ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch=1"],
            "parallel.sequence=true cannot share the 1 x 257 tokens of a micro-batch among parallel.tensor=2 ranks: "
            "use train.micro_batch=2, 4, 8, 16, 32, 64, 128 or 256",
        ),
        (
            1,
            ["parallel.recompute=full", "parallel.recompute_layers=49"],
            "parallel.recompute_layers=49 is more than the 48 layers of a tower: use at most 48, or 0 for all layers",
        ),
        (
            8,
            ["parallel.tensor=8", "train.global_batch=4", "train.micro_batch=4"],
            "train.global_batch=4 is not divisible",
        ),
    ],
)
def test_illegal_layouts(world_size: int, overrides: list[str], message: str) -> None:
    assert message in refusal("mim", *BIG, *overrides, ranks=world_size)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("parallel.sequence=true", "parallel.tensor=1: leave it out, or set parallel.tensor"),
        ("parallel.virtual_pipeline=2", "parallel.pipeline=1: leave it out, or set parallel.pipeline"),
        ("parallel.recompute_layers=2", "parallel.recompute=none: leave it out, or use parallel.recompute=full"),
        ("parallel.vision_split=[6]", "parallel.pipeline=1: leave it out, or set parallel.pipeline"),
        ("parallel.text_split=[4]", "parallel.pipeline=1: leave it out, or set parallel.pipeline"),
        ("parallel.overlap_grad_reduce=true", "one data-parallel rank: leave it out"),
        ("precision.gradients=bf16", "precision.compute=fp32: leave it out, or use precision.compute=bf16"),
    ],
)
def test_what_would_do_nothing(override: str, reason: str) -> None:
    assert refusal("mim", override) == f"{override} does nothing with {reason}"


def test_layers_in_fp8_have_nothing_to_forget() -> None:
    options = ["parallel.recompute=selective", "precision.fp8=emulated"]
    assert refusal("mim", *options) == (
        "parallel.recompute=selective does nothing with precision.fp8=emulated in all layers (none or full does): "
        "leave it out"
    )
    assert accepts("mim", *options, "precision.fp8_bf16_last=1")
    assert accepts("eval", "hardware=cpu", *options)  # which takes no FP8


def test_what_serves_training_alone_passes_in_an_evaluation() -> None:
    """`w2s run` gives its overrides to all steps."""
    assert accepts("eval", "hardware=cpu", "parallel.recompute=full", "parallel.overlap_grad_reduce=true", ranks=2)


def test_the_towers_of_an_evaluation_are_those_of_the_checkpoint() -> None:
    assert accepts("eval", "hardware=cpu", "parallel.tensor=4", ranks=4)  # the demo has 6 heads


def test_a_named_micro_batch_passes() -> None:
    fixed = ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch=2"]
    assert accepts("mim", *BIG, *fixed, ranks=2)
    filled = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch=12", "train.micro_batch=3"]
    filled += ["data.lanes=12"]
    assert accepts("mim", *BIG, *filled, ranks=2)


def test_overlapped_gathering_needs_overlapped_reduction() -> None:
    message = refusal("mim", "parallel.overlap_param_gather=true", "train.micro_batch=32", ranks=2)
    assert message.endswith("needs parallel.overlap_grad_reduce=true: set both")


@pytest.mark.parametrize(
    ("ranks", "options", "given", "fix"),
    [
        (1, [], "one data-parallel rank", "use more ranks (--nproc, --gpus)"),
        (2, ["parallel.tensor=2"], "parallel.tensor=2", "use parallel.tensor=1"),
        (4, ["parallel.pipeline=2", "train.micro_batch=16"], "parallel.pipeline=2", "use parallel.pipeline=1"),
        (2, ["parallel.overlap_grad_reduce=true"], "parallel.overlap_grad_reduce=true", "leave that out"),
    ],
)
def test_full_sharding_is_for_data_parallel_ranks(ranks: int, options: list[str], given: str, fix: str) -> None:
    assert accepts("mim", *BIG, "parallel.shard=full", ranks=2)
    refused = refusal("mim", *BIG, "parallel.shard=full", *options, ranks=ranks)
    assert refused.startswith(f"parallel.shard=full with {given}: ")
    assert refused.endswith(f"{fix}, or parallel.shard=optimizer")


def test_full_sharding_trains_every_weight() -> None:
    options = [*BIG[:-1], "init.vision=none", "parallel.shard=full"]
    assert accepts("clip", *options, ranks=2)
    assert "clip.learn_logit_scale=false" in refusal("clip", *options, "clip.learn_logit_scale=false", ranks=2)
