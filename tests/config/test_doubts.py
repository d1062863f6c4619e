from w2s.config.doubts import doubts
from w2s.config.load import load


def test_a_random_text_tower_at_a_rate_for_a_finished_one_is_doubted() -> None:
    (doubt,) = doubts(load("clip", ["model=eva_18b"]), 1)
    assert doubt == (
        "the text tower starts from random weights at optim.text_lr=4e-05, a rate for a finished one beside "
        "optim.vision_lr=0.0004: name one, such as init.text=teacher, or raise the rate"
    )
    for override in ("init.text=teacher", "init.checkpoint=run", "optim.text_lr=4e-4", "optim.vision_lr=1e-4"):
        assert doubts(load("clip", ["model=eva_18b", override]), 1) == []
    assert doubts(load("clip"), 1) == doubts(load("mim", ["model=eva_18b"]), 1) == []


def test_reading_processes_without_a_lane_are_doubted() -> None:
    (doubt,) = doubts(load("mim", ["data.lanes=32", "data.workers=8"]), 16)
    assert doubt == (
        "data.workers=8 are 2 on each rank, as many as it has of data.lanes=32: use data.lanes=128, or fewer workers"
    )
    assert doubts(load("mim", ["data.lanes=32", "data.workers=8"]), 4) == []
    (doubt,) = doubts(load("mim", ["data.lanes=32", "data.workers=3"]), 4)
    assert doubt == (
        "data.workers=3 do not divide the 8 lanes that a rank reads in a step (data.lanes=32 on 4 ranks): the workers "
        "with more of them hold up the others"
    )
