"""The simulated pipeline beside formulas where there are some, and its order beside Megatron's."""

from dataclasses import replace

import pytest

from w2s.planning.model.simulated_schedule import Passes, Pipeline, Turn, order, seconds


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
    taken = seconds(Pipeline(stages, chunks, stages, count), even(stages, chunks))
    assert taken == pytest.approx(3 * (count + (stages - 1) / chunks))


def test_many_micro_batches_take_what_a_few_and_the_rest_take() -> None:
    """The last group may be smaller."""
    for count in (40, 41, 57):
        taken = seconds(Pipeline(4, 1, 4, count), even(4, 1))
        assert taken == pytest.approx(3 * (count + 3))


def test_messages_delay_a_pipeline_without_slack_and_larger_groups_give_it_some() -> None:
    """PP4 VPP12 of 48 layers, 4.32 ms forward each for 16 images, 1.12 ms a message; figures of an earlier trial."""
    whole, half = 12 * 4.32e-3, 12 * 4.32e-3 / 2 * 1.04
    assert seconds(Pipeline(4, 12, 4, 4), even(4, 12, whole)) == pytest.approx(0.661, abs=5e-4)
    assert seconds(Pipeline(4, 12, 4, 4), even(4, 12, whole, message=1.12e-3)) == pytest.approx(0.766, abs=5e-4)
    tight, roomy = (seconds(Pipeline(4, 12, group, 8), even(4, 12, half, message=0.56e-3)) for group in (4, 8))
    assert (tight, roomy) == (pytest.approx(0.720, abs=5e-4), pytest.approx(0.671, abs=5e-4))


def test_without_chunks_both_ends_wait_for_a_message() -> None:
    """F, message, F B, message of the gradient, F B, message, B: of two micro-batches on two stages."""
    taken = seconds(Pipeline(2, 1, 2, 2), even(2, 1, message=0.25))
    assert taken == pytest.approx(3 * 3 + 3 * 0.25)


def test_weights_that_are_gathered_with_the_pass_hide_behind_it() -> None:
    alone = Passes(((1.0, 1.0),), ((2.0, 2.0),), gather=((0.5, 0.5),), reduce=((0.5, 0.5),))
    # The first chunk's weights are waited for, and the gradients of the chunk that comes last.
    assert seconds(Pipeline(1, 2, 1, 2), alone) == pytest.approx(12 + 2 * 0.5)
    # In ten parts, a tenth of each is waited for.
    parts = replace(alone, buckets=((10, 10),))
    assert seconds(Pipeline(1, 2, 1, 2), parts) == pytest.approx(12 + 2 * 0.05)


def test_forward_passes_alone() -> None:
    assert seconds(Pipeline(2, 1, 2, 5), Passes(((1.0,), (1.0,)))) == pytest.approx(6)
