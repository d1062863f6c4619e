"""The simulated pipeline beside formulas where there are some, and its order beside Megatron's."""

import pytest

from w2s.planning.cards import card
from w2s.planning.roofline import exchange, message
from w2s.planning.schedule import Passes, Pipeline, Turn, order, seconds
from w2s.planning.tape import Group

H100 = card("h100")


def even(stages: int, chunks: int, forward: float = 1.0, **more: object) -> Passes:
    """Chunks that all take the same time, twice that backward."""

    def row(each: float) -> tuple[tuple[float, ...], ...]:
        return tuple((each / chunks,) * chunks for _ in range(stages))

    return Passes(row(forward), row(2 * forward), **more)  # type: ignore[arg-type]


def test_the_order_of_a_small_pipeline() -> None:
    first, last = (order(Pipeline(2, 1, 2, 3), stage) for stage in (0, 1))
    assert [(turn.backward, turn.micro_batch) for turn in first] == [
        (False, 0), (False, 1), (True, 0), (False, 2), (True, 1), (True, 2)
    ]  # fmt: skip
    assert last[:2] == (Turn(False, 0, 0), Turn(True, 0, 0))
    assert [turn.chunk for turn in order(Pipeline(2, 2, 2, 4), 1)[:4]] == [0, 0, 1, 1]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("rounds", [1, 3])
def test_without_messages_the_bubble_is_that_of_the_formula(stages: int, chunks: int, rounds: int) -> None:
    """Narayanan et al. 2021, section 2.2: (p - 1) / v turns of a stage idle."""
    count = stages * rounds
    taken = seconds(Pipeline(stages, chunks, stages, count), even(stages, chunks), H100)
    assert taken == pytest.approx(3 * (count + (stages - 1) / chunks))


def test_many_micro_batches_take_what_a_few_and_the_rest_take() -> None:
    """The last group may be smaller."""
    for count in (40, 41, 57):
        taken = seconds(Pipeline(4, 1, 4, count), even(4, 1), H100)
        assert taken == pytest.approx(3 * (count + 3))


def test_messages_delay_a_pipeline_without_slack_and_larger_groups_give_it_some() -> None:
    """The audit's trial: PP4 VPP12 with 4 micro-batches, 1.1 ms of latency beside chunks of 4.3 and 8.6 ms."""
    size = int(1.12e-3 * H100.bandwidth(within_node=False))
    assert message(H100, size, 64) == pytest.approx(1.12e-3, rel=1e-3)
    passes = even(4, 12, 12 * 4.32e-3, message=size, distance=64)
    bare = seconds(Pipeline(4, 12, 4, 4), even(4, 12, 12 * 4.32e-3), H100)
    tight = seconds(Pipeline(4, 12, 4, 4), passes, H100)
    assert tight > bare + 48 * 2 * 0.9e-3, "each of the chunks waits for its message"
    half = even(4, 12, 6 * 4.32e-3, message=size // 2, distance=64)
    roomy = seconds(Pipeline(4, 12, 8, 8), half, H100)
    assert roomy < bare + 0.1 * (tight - bare) + 0.02


def test_weights_that_are_gathered_with_the_pass_hide_behind_it() -> None:
    data, size = Group("data", tuple(range(64)), on_gpu=True), 10**9
    gather = exchange(H100, size, 64, 1)
    alone = Passes(((1.0, 1.0),), ((2.0, 2.0),), data=data, weights=((size, size),), gradients=((size, size),))
    taken = seconds(Pipeline(1, 2, 1, 2), alone, H100)
    # The first chunk's weights are waited for, and the gradients of the chunk that comes last.
    assert taken == pytest.approx(12 + 2 * gather)


def test_forward_passes_alone() -> None:
    passes = Passes(((1.0,), (1.0,)), ())
    assert seconds(Pipeline(2, 1, 2, 5), passes, H100) == pytest.approx(6)
