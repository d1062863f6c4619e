"""Whether the ranks of each group call one another alike: what differs would hang on a cluster, or mix up data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, zip_longest

from w2s.rehearsal.tape import MESSAGES, Call, Group, Tape


@dataclass(frozen=True)
class Disagreement:
    """The first call in which two ranks differ."""

    group: str
    """What the group is for."""
    ranks: tuple[int, int]
    calls: tuple[Call | None, Call | None]
    """What each rank does; None where it does nothing more."""

    @property
    def gist(self) -> tuple[str, frozenset[str]]:
        """What pairs of ranks that differ in the same have in common."""
        return self.group, frozenset(map(_does, self.calls))

    def __str__(self) -> str:
        (first, second), (one, other) = self.ranks, self.calls
        return (
            f"ranks {first} and {second} would wait for each other for ever ({self.group} group): "
            f"rank {first} {_does(one)}, rank {second} {_does(other)}"
        )


def _does(call: Call | None) -> str:
    if call is None:
        return "does nothing more"
    whom = {"send": f" to rank {call.peer}", "receive": f" from rank {call.peer}"}.get(call.kind, "")
    verb = {"send": "sends", "receive": "receives"}.get(call.kind)
    if verb is None:
        return f"begins {call.meaning} at {call.where}"
    return f"{verb} {' and '.join(call.tensors)}{whom} at {call.where}"


def disagreements(tapes: Sequence[Tape]) -> list[Disagreement]:
    """Compare what ranks of the same groups do; ranks that were not rehearsed are taken to do what they should."""
    differences: list[Disagreement] = []
    for one, other in combinations(tapes, 2):
        for index in one.groups.keys() & other.groups.keys():
            group, calls = one.groups[index], (_of(one, index), _of(other, index))
            differences += _compare(group, (one.rank, other.rank), *(list(_collectives(each)) for each in calls))
            differences += _compare_messages(group, (one.rank, other.rank), *calls)
    return differences


def _of(tape: Tape, group: int) -> list[Call]:
    return [call for call in tape.calls() if call.group == group]


def _collectives(calls: Iterable[Call]) -> Iterator[Call]:
    return (call for call in calls if call.kind not in MESSAGES)


def _compare(group: Group, ranks: tuple[int, int], one: list[Call], other: list[Call]) -> Iterator[Disagreement]:
    for pair in zip_longest(one, other):
        if pair[0] is None or pair[1] is None or pair[0].meaning != pair[1].meaning:
            yield Disagreement(group.name, ranks, pair)
            return


def _compare_messages(
    group: Group, ranks: tuple[int, int], one: list[Call], other: list[Call]
) -> Iterator[Disagreement]:
    """Messages between two GPUs go one after the other, but for those of a batch: each send must meet its receive."""
    first, second = ranks
    sides = _between(one, first, second, group.on_gpu), _between(other, second, first, group.on_gpu)
    for pair in zip_longest(*sides):
        if pair[0] is None or pair[1] is None or not _meet(*pair):
            yield Disagreement(group.name, ranks, pair)
            return


def _between(calls: list[Call], rank: int, peer: int, ordered: bool) -> list[Call]:
    """The messages of a rank with a peer, in an order in which they meet those of the peer's list."""

    def is_back(call: Call) -> bool:
        """Whether it goes to the lower rank."""
        return (call.kind == "send") == (peer < rank)

    joined: list[Call] = []
    messages = [call for call in calls if call.kind in MESSAGES and call.peer == peer]
    for batch, several in groupby(messages, key=lambda call: call.batch if ordered else 0):
        together = list(several)
        joined += sorted(together, key=is_back) if batch >= 0 else together
    return joined


def _meet(one: Call, other: Call) -> bool:
    return {one.kind, other.kind} == set(MESSAGES) and one.tensors == other.tensors
