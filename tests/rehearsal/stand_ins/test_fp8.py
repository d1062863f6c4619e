"""FP8 in a rehearsal: what Transformer Engine would keep, round and multiply."""

import pytest
import torch

from tests.rehearsal.test_rehearsal import H100, SLOW, calls_of, configured, rehearsed
from w2s.bench.marks import Parts
from w2s.config.load import load
from w2s.errors import UserError
from w2s.megatron.fp8 import fp8_emulation
from w2s.planning.time.roofline import moving, product
from w2s.rehearsal.rehearsal import run
from w2s.rehearsal.stand_ins.fp8 import stand_in_for_transformer_engine
from w2s.rehearsal.stand_ins.meter import Meter
from w2s.rehearsal.tape import Compute, Tape

BF16 = ["precision.compute=bf16", "teacher.precision=bf16"]
FP8 = [*BF16, "precision.fp8=tensorwise"]


class Linear:
    """As a pass begins."""

    cached_weight, caches_weight = None, True


def test_a_linear_keeps_its_input_in_a_byte_and_two_copies_of_its_weight() -> None:
    tape = Tape(0)
    meter = Meter(tape, H100, Parts())
    linear = Linear()
    with meter.fake, meter, stand_in_for_transformer_engine(meter):
        weight = meter.new((64, 32), torch.bfloat16).requires_grad_()
        passes = [meter.new((48, 32), torch.bfloat16).requires_grad_() for _ in range(2)]
        standing = meter.now
        outputs = [fp8_emulation.Product.apply(rows, weight, linear) for rows in passes]
        kept = meter.now - standing
        outputs[1].backward(meter.new((48, 64), torch.bfloat16))
    assert kept == 2 * 64 * 32 + 2 * (48 * 32 + 2 * 48 * 64)
    assert (weight.grad.shape, weight.grad.dtype) == ((64, 32), torch.bfloat16)
    assert passes[1].grad.shape == (48, 32)
    # Rounding reads twice and writes one byte twice: the weight once, two inputs, one gradient.
    rounded = moving(H100, 6 * (64 * 32 + 2 * 48 * 32 + 48 * 64))
    products = 2 * product(H100, 48, 32, 64, fp8=True)
    products += product(H100, 48, 64, 32, fp8=True) + product(H100, 64, 48, 32, fp8=True)
    spent = sum(event.seconds for event in tape.events if isinstance(event, Compute))
    assert spent == pytest.approx(rounded + products)


@pytest.mark.parametrize(
    "options",
    [
        ["precision.fp8=delayed"],
        ["precision.fp8=blockwise"],
        ["precision.fp8=tensorwise", "precision.fp8_primary_weights=true"],
        ["precision.fp8=tensorwise", "parallel.tensor=2"],
    ],
)
def test_calls_of_transformer_engine_are_not_made_up(options: list[str]) -> None:
    given = " with ".join(options) if "parallel.tensor=2" in options else options[-1]
    with pytest.raises(UserError, match=f"^{given} is not rehearsed.*parallel.tensor=1, or precision.fp8=none"):
        run(configured("mim", *BF16, *options), 8, H100, [0], 2)


@SLOW
@pytest.mark.parametrize("layout", [[], ["parallel.pipeline=1", "parallel.shard=full"]])
def test_fp8_calls_what_bfloat16_does(layout: list[str]) -> None:
    wide = ["model.vision.width=256", "model.vision.mlp_width=1024", "train.micro_batch=16", "train.global_batch=128"]
    bf16, fp8 = (
        rehearsed(configured("mim", *wide, *layout, *BF16, *precision), 4, [0, 3])
        for precision in ([], ["precision.fp8=emulated"])
    )
    assert not bf16.wrong and not fp8.wrong
    for one, two in zip(bf16.ranks, fp8.ranks, strict=True):
        assert calls_of(one) == calls_of(two)


@SLOW
@pytest.mark.parametrize(
    "layout",
    [["parallel.shard=full", "train.micro_batch=16"], ["parallel.pipeline=4", "train.micro_batch=16"]],
    ids=["fully sharded", "pipeline"],
)
def test_memory_in_fp8_is_what_the_planner_says(layout: list[str]) -> None:
    large = ["model=eva_18b", "model.vision.layers=8", "teacher.source=eva:tiny", "data=shards", "data.train=DATA"]
    batch = ["train.global_batch=4096", "data.lanes=4096"]
    found = run(load("mim", [*large, *FP8, *layout, *batch]), 256, H100, [0], 2, data=False)
    assert not found.wrong
    assert found.ranks[0].peak == pytest.approx(found.planned[0].total, rel=0.03)
