"""Ranks that would hang, or mix up data, by tapes written by hand."""

from itertools import count

from w2s.rehearsal.agreement import disagreements
from w2s.rehearsal.tape import Call, Group, Tape

WORLD = Group("world", (0, 1, 2), on_gpu=True)
GLOO = Group("world", (0, 1, 2), on_gpu=False)


def tape(rank: int, *calls: Call, group: Group = WORLD) -> Tape:
    return Tape(rank, {0: group}, list(calls), [0])


def collective(kind: str, tensor: str = "float32[4]", where: str = "a.py:1", reduction: str = "") -> Call:
    return Call(0, kind, 0, (tensor,), 16, where, "forward", reduction=reduction)


def message(kind: str, peer: int, tensor: str = "float32[4]", batch: int = -1) -> Call:
    return Call(0, kind, 0, (tensor,), 16, f"{kind}.py:{peer}", "forward", peer=peer, batch=batch)


def test_ranks_that_do_the_same_agree() -> None:
    calls = [collective("all_reduce", reduction="sum"), collective("all_gather", where="b.py:7")]
    assert disagreements([tape(rank, *calls) for rank in range(3)]) == []


def test_two_ranks_that_reduce_in_another_order_are_named() -> None:
    first, second = collective("all_reduce", "float32[4]", "a.py:1"), collective("all_reduce", "float32[8]", "b.py:2")
    (found,) = disagreements([tape(0, first, second), tape(1, second, first)])
    assert str(found) == (
        "ranks 0 and 1 would wait for each other for ever (world group): rank 0 begins all_reduce of float32[4] at "
        "a.py:1, rank 1 begins all_reduce of float32[8] at b.py:2"
    )


def test_a_rank_that_ends_early_or_reduces_otherwise() -> None:
    (found,) = disagreements([tape(0, collective("barrier")), tape(1)])
    assert str(found).endswith("rank 0 begins barrier of float32[4] at a.py:1, rank 1 does nothing more")
    sums = [collective("all_reduce", reduction=how) for how in ("sum", "max")]
    (found,) = disagreements([tape(0, sums[0]), tape(1, sums[1])])
    assert "all_reduce (sum)" in str(found) and "all_reduce (max)" in str(found)


def test_each_send_meets_its_receive() -> None:
    down = [message("send", 1), message("send", 1)], [message("receive", 0), message("receive", 0)]
    assert disagreements([tape(0, *down[0]), tape(1, *down[1])]) == []
    (found,) = disagreements([tape(0, *down[0]), tape(1, down[1][0])])
    assert str(found).endswith("rank 0 sends float32[4] to rank 1 at send.py:1, rank 1 does nothing more")
    other = message("receive", 0, "float32[8]")
    (found,) = disagreements([tape(0, down[0][0]), tape(1, other)])
    assert str(found).endswith("rank 1 receives float32[8] from rank 0 at receive.py:0")


def test_two_ranks_that_both_send_first_hang_on_gpus_unless_the_messages_are_a_batch() -> None:
    def both(batch: int, group: Group = WORLD) -> list[Tape]:
        return [
            tape(rank, message("send", 1 - rank, batch=batch), message("receive", 1 - rank, batch=batch), group=group)
            for rank in (0, 1)
        ]

    assert len(disagreements(both(-1))) == 1
    assert disagreements(both(3)) == []
    assert disagreements(both(-1, GLOO)) == [], "over gloo a send waits for nobody"


def test_messages_to_ranks_that_were_not_rehearsed_are_taken_to_arrive() -> None:
    numbers = count(1)
    assert disagreements([tape(0, *(message("send", 2) for _ in range(next(numbers)))), tape(1)]) == []
