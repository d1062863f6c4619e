"""What full sharding costs: gathers and reductions that hide behind layers, or do not."""

import pytest

from tests.planning.test_plan import eva_18b
from w2s.config.load import load
from w2s.planning.layouts import Layouts
from w2s.planning.memory.fully_sharded_costs import exposed, whole
from w2s.planning.model.towers import planned_towers

LAYERS = 10


@pytest.mark.parametrize(
    ("gather", "reduce", "delay"),
    [
        (0.0, 0.0, 0.0),
        (0.5, 0.0, 0.5),  # the first gather
        (0.5, 1.0, 1.5),  # and the last reduction
        (2.0, 0.0, 2 * LAYERS * 2.0 + 2.0 - LAYERS * 3.0),  # nothing but gathers, and the last backward pass
    ],
)
def test_what_hides_behind_layers(gather: float, reduce: float, delay: float) -> None:
    assert exposed(LAYERS, 1, 1.0, 2.0, gather, reduce, ahead=2) == pytest.approx(delay)


def test_a_slow_network_is_the_step() -> None:
    """All that is exchanged goes one after the other: 2 gathers and a reduction of each layer."""
    delay = exposed(LAYERS, 3, 1.0, 2.0, 10.0, 20.0, ahead=2)
    assert delay + 3 * LAYERS * 3.0 == pytest.approx(3 * LAYERS * 40.0, rel=0.01)


def test_what_full_sharding_cannot_do_is_not_searched() -> None:
    for learnt, searched in (("true", {"optimizer", "full"}), ("false", {"optimizer"})):
        layouts = Layouts(eva_18b("clip", f"clip.learn_logit_scale={learnt}"), 256, ())
        assert {split.parallel.shard for split in layouts.splits()} == searched


def test_what_a_rank_of_eva_18b_has_whole() -> None:
    """Bytes of the buffers that the rehearsal of 256 ranks finds at its fullest moment."""
    config = load("clip", ["model=eva_18b", "data.builtin=none", "precision.compute=bf16", "init.vision=none"])
    vision, text = (whole(tower, config.precision, 256) for tower in planned_towers(config))
    assert (vision.gradients, vision.waiting) == (1_494_220_800, 4)
    assert vision.weights == 3 * 747_110_400 + 680_032_256
    assert (text.gradients, text.waiting) == (83_886_080, 32), "a billion elements may wait: all of it"
