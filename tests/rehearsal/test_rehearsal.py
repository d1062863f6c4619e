"""Small layouts, rehearsed: what they call, what is wrong with them, and what they hold."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.rehearsal.real import Noted, real_calls
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.megatron.parallel.gradients import global_norm
from w2s.objectives import masked_loss
from w2s.planning.time.cards import card
from w2s.rehearsal.kinds import chosen
from w2s.rehearsal.rank import Job, RankReport, rehearse
from w2s.rehearsal.rehearsal import Rehearsal, conclude, perform
from w2s.rehearsal.report import document
from w2s.rehearsal.tape import Call, Compute, Tape
from w2s.stages.clip import ContrastiveStage
from w2s.stages.mim import MaskedStage

H100 = card("h100")
SLOW = pytest.mark.slow
COMMON = [
    "model=tiny",
    "model.vision.layers=4",
    "model.text.layers=4",
    "teacher.source=eva:tiny",
    "data.builtin=none",
    "train.global_batch=32",
    "train.micro_batch=4",
    "parallel.pipeline=2",
]
TENSOR = ["parallel.tensor=2", "parallel.sequence=true"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
LAYOUTS = {
    "tensor, pipeline, data": [*TENSOR],
    "virtual pipeline": [*TENSOR, *OVERLAP, "parallel.virtual_pipeline=2"],
    "virtual pipeline, data": [*OVERLAP, "parallel.virtual_pipeline=2"],
    "fully sharded": ["parallel.pipeline=1", "parallel.shard=full", "train.micro_batch=8"],
    "fully sharded, recomputed": ["parallel.pipeline=1", "parallel.shard=full", "parallel.recompute=full"],
}
STAGES = {"mim": MaskedStage, "clip": ContrastiveStage}
CASES = [(stage, layout) for stage in STAGES for layout in ("tensor, pipeline, data", "virtual pipeline")]


def configured(stage: str, *overrides: str) -> Config:
    start = ["init.vision=none"] if stage == "clip" else []
    return load(stage, [*COMMON, *start, *overrides])


def rehearsed(
    config: Config, world_size: int, ranks: Sequence[int], be: Callable[[Job], RankReport] = rehearse
) -> Rehearsal:
    jobs = [Job(config, rank, world_size, 2, H100) for rank in ranks]
    return conclude(config, world_size, H100, perform(be, jobs))


def calls_of(report: RankReport) -> list[Noted]:
    """The same as real ranks note."""
    groups, tape = report.tape.groups, report.tape
    events = [call for call in tape.calls() if call.number >= first_call(report) and call.tensors]
    return [(call.kind, groups[call.group].ranks, call.tensors, call.peer) for call in events]


def first_call(report: RankReport) -> int:
    return next(e.number for e in report.tape.events[report.tape.steps[0] :] if isinstance(e, Call))


@pytest.mark.parametrize(
    ("stage", "layout", "ranks"),
    [
        ("mim", "virtual pipeline, data", 4),
        ("mim", "fully sharded", 2),
        pytest.param("clip", "fully sharded", 2, marks=SLOW),
        pytest.param("clip", "fully sharded, recomputed", 2, marks=SLOW),
        *(pytest.param(*case, 8, marks=SLOW) for case in CASES),
    ],
)
def test_a_rehearsal_calls_what_real_ranks_call(stage: str, layout: str, ranks: int) -> None:
    config = configured(stage, *LAYOUTS[layout])
    found = rehearsed(config, ranks, range(ranks))
    assert not found.wrong
    listed = document(found)["ranks"][0]["calls"]
    assert [call["kind"] for call in listed] == [e.kind for e in found.ranks[0].tape.last_step if isinstance(e, Call)]
    assert all(call["where"] and call["group"] for call in listed)
    real = run_ranks(real_calls, ranks, config, STAGES[stage], 2)
    for rank, report in enumerate(found.ranks):
        assert calls_of(report) == real[rank], f"rank {rank}"
        assert len(real[rank]) > 50


def test_ranks_of_each_kind_stand_for_all() -> None:
    parallel = configured("mim", *TENSOR).parallel
    assert chosen("kinds", parallel, 16) == [0, 1, 6, 7, 8, 9, 14, 15]
    assert chosen("pipeline", parallel, 16) == [0, 8]
    assert chosen("3,1", parallel, 16) == [1, 3]


def in_full(job: Job) -> RankReport:
    """No micro-batch repeats what another did."""
    with mock.patch("w2s.rehearsal.rank.shortened", lambda *_: nullcontext()):
        return rehearse(job)


def done(report: RankReport) -> list[Any]:
    """What a rank does; all work of a part until something else comes is one."""
    tape = Tape(report.tape.rank)
    for event in report.tape.events:
        if not isinstance(event, Compute):
            tape.events.append(event)
        elif event.seconds:
            tape.compute(event.part, event.seconds)
    # Seconds are added up in another order.
    return [(e.part, pytest.approx(e.seconds)) if isinstance(e, Compute) else e for e in tape.events]


RECOMPUTED = ["parallel.recompute=full", "parallel.recompute_layers=1"]
ALONE = ["parallel.pipeline=1", "train.global_batch=80"]


@SLOW
@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        ("mim", [*ALONE, "parallel.shard=full"]),
        ("mim", [*ALONE, "parallel.shard=full", *RECOMPUTED]),
        ("clip", [*ALONE, "parallel.shard=full", *RECOMPUTED]),
        ("clip", [*ALONE, *OVERLAP]),
        ("mim", [*TENSOR, *OVERLAP, *RECOMPUTED, "train.global_batch=48"]),
        ("clip", [*OVERLAP, *RECOMPUTED, "parallel.virtual_pipeline=2", "train.global_batch=48"]),
    ],
)
def test_repeated_micro_batches_do_what_all_do(stage: str, layout: list[str]) -> None:
    config = configured(stage, *layout, "precision.compute=bf16", "teacher.precision=bf16")
    world_size = 4 * config.parallel.tensor
    short, full = (rehearsed(config, world_size, [0, world_size // 2], be) for be in (rehearse, in_full))
    assert not short.wrong
    for one, two in zip(short.ranks, full.ranks, strict=True):
        assert done(one) == done(two)
        assert (one.peak, one.parts, one.fullest) == (two.peak, two.parts, two.fullest)
        assert (one.built, one.written) == (two.built, two.written)
    assert short.timeline.steps == pytest.approx(full.timeline.steps)


def test_a_fully_sharded_layer_is_gathered_once_each_way() -> None:
    """Neither for the head nor as the embedding goes back is a layer gathered ahead that has computed."""
    config = configured("mim", "parallel.pipeline=1", "parallel.shard=full")
    (report,) = rehearsed(config, 4, [0]).ranks
    gathers = Counter(e.tensors for e in report.tape.last_step if isinstance(e, Call) and e.kind == "all_gather")
    layers, ways, micro_batches = 4, 2, 2
    assert gathers.most_common(1)[0][1] == layers * ways * micro_batches


def swapped(job: Job) -> RankReport:
    """Rank 1 reduces the norm of its gradients after another call, all others before it."""
    norm = global_norm

    def other_order(local, group, device, beside=None):  # type: ignore[no-untyped-def]
        extra = torch.zeros(3, device=device)
        if job.rank == 1:
            dist.all_reduce(extra, group=group)
            return norm(local, group, device, beside)
        found = norm(local, group, device, beside)
        dist.all_reduce(extra, group=group)
        return found

    with mock.patch("w2s.megatron.parallel.gradients.global_norm", other_order):
        return rehearse(job)


def test_two_ranks_that_reduce_in_another_order_are_found() -> None:
    found = rehearsed(configured("mim", *TENSOR), 8, [0, 1, 4], swapped)
    assert not found.timeline.steps
    (line,) = found.wrong
    assert line.startswith("ranks 0 and 1 would wait for each other for ever (world group): rank 0 begins all_reduce")
    assert (
        "float32[] at w2s/megatron/parallel/gradients.py:" in line
        and "float32[3] at tests/rehearsal/test_rehearsal.py:" in line
    )
    assert line.endswith(", and so would 1 more pair of ranks"), "1 and 4"


def test_drawn_teachers_are_rehearsed() -> None:
    """The host knows who shows what to which teacher: it waits for no GPU, and all ranks exchange the same."""
    several = "teachers=[{name: one, source: 'eva:tiny'}, {name: two, source: 'timm:test_vit', image_size: 64}]"
    options = [*(each for each in COMMON if not each.startswith("teacher.")), "parallel.tensor=2"]
    found = rehearsed(load("mim", [*options, several, "teachers.draw=one"]), 4, [0, 3])
    assert found.wrong == []
    assert found.timeline.steps


def waiting(job: Job) -> RankReport:
    """The loss is looked at in every step."""
    loss = masked_loss.LOSSES["cosine"]

    def looked_at(*args: torch.Tensor) -> torch.Tensor:
        value = loss(*args)
        assert value.item() == value.cpu().item()
        return value

    with mock.patch.dict(masked_loss.LOSSES, cosine=looked_at):
        return rehearse(job)


def test_a_wait_for_the_gpu_is_found() -> None:
    found = rehearsed(configured("mim"), 2, [0, 1], waiting)
    assert [line.partition(" at ")[0] for line in found.wrong] == [
        "rank 1 would wait for the GPU in every step: item()",
        "rank 1 would wait for the GPU in every step: cpu()",
    ]
    assert all("tests/rehearsal/test_rehearsal.py:" in line for line in found.wrong)
    assert found.timeline.steps, "it is slow, and continues"


def selecting(job: Job) -> RankReport:
    """The loss is of as many patches as numbers say."""
    loss = masked_loss.LOSSES["cosine"]
    chosen = {"cosine": lambda ours, theirs, rows: loss(ours[ours > 0], theirs, rows)}
    with mock.patch.dict(masked_loss.LOSSES, chosen):
        return rehearse(job)


def test_a_shape_that_depends_on_numbers_is_a_wait_and_no_failure() -> None:
    found = rehearsed(configured("mim"), 2, [0, 1], selecting)
    (line,) = found.wrong
    assert line.startswith("rank 1 cannot be rehearsed beyond tests/rehearsal/test_rehearsal.py:")
    assert line.endswith(": aten.nonzero.default waits for the GPU, to see its numbers")


def misshaped(job: Job) -> RankReport:
    """The loss gets targets of another width."""
    loss = masked_loss.LOSSES["cosine"]
    with mock.patch.dict(masked_loss.LOSSES, cosine=lambda ours, theirs, _: loss(ours, theirs[..., :-1])):
        return rehearse(job)


def test_a_wrong_shape_is_found() -> None:
    found = rehearsed(configured("mim"), 2, [0, 1], misshaped)
    (line,) = found.wrong
    assert line.startswith("rank 1 would fail at w2s/objectives/masked_loss.py:")
    assert "must match the size of tensor b" in line


def test_memory_of_a_rank_is_what_the_planner_says() -> None:
    """bfloat16, as on a GPU; at this size the planner's estimates of temporaries weigh more than in a large model."""
    config = configured("mim", *TENSOR, "precision.compute=bf16", "teacher.precision=bf16")
    found = rehearsed(config, 8, [0, 4])
    for report in found.ranks:
        planned = found.planned[report.tape.rank]
        assert report.peak == pytest.approx(planned.total, rel=0.25)
        assert report.fullest.startswith(("w2s/", "stages/", "megatron/")), "below the folder of its package"
        assert report.built > planned.weights + planned.gradients
        # Weights in bfloat16, and 12 bytes a parameter of the optimizer's share.
        assert report.written == pytest.approx(planned.weights / 2 + planned.optimizer, rel=0.05)


def test_a_moving_average_has_the_planned_memory_and_waits_for_nothing() -> None:
    bf16 = ["precision.compute=bf16", "teacher.precision=bf16"]
    without, kept = (rehearsed(configured("mim", *TENSOR, *bf16, f"optim.ema={ema}"), 8, [4]) for ema in (0, 0.9999))
    assert not kept.wrong
    for before, after in zip(without.ranks, kept.ranks, strict=True):
        planned = kept.planned[after.tape.rank].average
        assert after.built - before.built == planned > 0
        assert after.peak - before.peak == pytest.approx(planned, rel=0.01)  # beside it there are some scalars
        # Of what tensor-parallel ranks have alike one writes.
        assert 0.8 * planned < after.written - before.written <= planned


@SLOW
@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("mim", ["train.global_batch=4096", "train.micro_batch=16"]),
        ("clip", ["train.global_batch=108544", "train.micro_batch=424", "init.vision=none"]),
        ("clip", ["train.global_batch=54272", "train.micro_batch=53", "init.vision=none"]),
    ],
)
def test_memory_of_full_sharding_is_what_the_planner_says(stage: str, overrides: list[str]) -> None:
    """The backward pass is fullest where gradients of several layers wait, and as many layers have let go of theirs."""
    large = ["model=eva_18b", "model.vision.layers=8", "teacher.source=eva:tiny", "data.builtin=none", *overrides]
    bf16 = ["precision.compute=bf16", "teacher.precision=bf16", "parallel.shard=full"]
    found = rehearsed(load(stage, [*large, *bf16]), 256, [0])
    (report,) = found.ranks
    assert not report.failure
    assert report.peak == pytest.approx(found.planned[0].total, rel=0.03)


@SLOW
def test_memory_of_a_small_student_of_wide_teachers_is_what_the_planner_says() -> None:
    """What is fullest is the loss: predictions and targets in float32 weigh more than the temporaries of a layer."""
    teachers = "teachers=[{source: eva:eva_s, name: a}, {source: eva:eva_l, name: b}]"
    size = ["train.global_batch=512", "train.micro_batch=64", "optim.ema=0.999", "parallel.shard=full"]
    bf16 = ["precision.compute=bf16", "teacher.precision=bf16"]
    found = rehearsed(load("mim", ["model=eva_s", teachers, "data.builtin=none", *size, *bf16]), 8, [0])
    assert found.ranks[0].peak == pytest.approx(found.planned[0].total, rel=0.03)
