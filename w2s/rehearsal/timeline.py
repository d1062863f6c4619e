"""When what some ranks do would happen: their tapes, played against one another.

The GPU of a rank works through its own events in order. Calls run beside it, one after the other in each group and
from each rank to each other; a call begins when the last of its ranks has come to it, and a `Wait` lets the GPU stand
still until it is done. The host is taken to be ahead of the GPU.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from w2s.planning.time.cards import Card
from w2s.planning.time.roofline import exchange, message
from w2s.rehearsal.tape import MESSAGES, Call, Compute, Group, Tape, Wait

Key = tuple[int, int, int, int]
"""What the ranks of a call know it by: group, sender and receiver (0 for collectives), and its number among those."""


GPU_LANE = "computing"
"""The lane of a rank's own work."""


@dataclass(frozen=True)
class Span:
    """Something that a rank does for a while."""

    rank: int
    lane: str
    """`GPU_LANE`, or what the group of a call is for."""
    name: str
    begin: float
    end: float
    """Seconds."""


Kind = tuple[str, int, str]
"""What a group is for, its size, and the kind of a call."""


@dataclass
class Timeline:
    """What a simulated rehearsal takes."""

    spans: list[Span] = field(default_factory=list)
    spent: dict[Kind, tuple[float, float]] = field(default_factory=dict)
    """By what a group is for, its size and the kind of call: seconds of the calls in the last step, and those in which
    a GPU waits for them; each of the rank that has most."""
    steps: list[float] = field(default_factory=list)
    """Seconds of each step, of the slowest rank."""
    stuck: list[str] = field(default_factory=list)
    """What ranks wait for that would never come; empty where all end."""


class _Playing:
    """A rank on its way through its tape."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self.place, self.now = tape, 0, 0.0
        self.keys: dict[int, Key] = {}
        self.kinds: dict[int, Kind] = {}
        self.begun: list[float] = []
        self._counts: Counter[tuple[int, int, int]] = Counter()

    @property
    def in_last_step(self) -> bool:
        """Whether it has come to its last step."""
        return bool(self.tape.steps) and self.place >= self.tape.steps[-1]

    def key(self, call: Call) -> Key:
        """Return what all ranks of a call know it by."""
        ends = {"send": (self.tape.rank, call.peer), "receive": (call.peer, self.tape.rank)}.get(call.kind, (-1, -1))
        lane = (call.group, *ends)
        group = self.tape.groups[call.group]
        self.kinds[call.number] = (group.name, len(group.ranks), call.kind)
        self._counts[lane] += 1
        self.keys[call.number] = (*lane, self._counts[lane])
        return self.keys[call.number]


def play(tapes: Sequence[Tape], card: Card) -> Timeline:
    """Simulate ranks that agree with one another; calls of ranks that were not rehearsed are there in time."""
    return _Play(tapes, card).run()


class _Play:
    def __init__(self, tapes: Sequence[Tape], card: Card) -> None:
        self._card, self._ranks = card, {tape.rank: _Playing(tape) for tape in tapes}
        self._posted: dict[Key, dict[int, float]] = defaultdict(dict)
        self._done: dict[Key, float] = {}
        self._free: dict[tuple[int, int, int], float] = defaultdict(float)
        self._timeline = Timeline()
        self._spent: dict[tuple[int, Kind], float] = defaultdict(float)
        self._waited: dict[tuple[int, Kind], float] = defaultdict(float)

    def run(self) -> Timeline:
        going = True
        while going:
            going = any([self._advance(rank) for rank in self._ranks.values()])
        for rank in self._ranks.values():
            if rank.place < len(rank.tape.events):
                wait = rank.tape.events[rank.place]
                self._timeline.stuck.append(f"rank {rank.tape.rank} waits for ever at {wait.where}")  # type: ignore[union-attr]
        for (place, kind), seconds in self._spent.items():
            spent, waited = self._timeline.spent.get(kind, (0.0, 0.0))
            self._timeline.spent[kind] = max(spent, seconds), max(waited, self._waited[place, kind])
        self._timeline.steps = [max(ends) for ends in zip(*map(_step_seconds, self._ranks.values()), strict=True)]
        return self._timeline

    def _advance(self, rank: _Playing) -> bool:
        """Continue as far as the other ranks let this one; return whether it continued at all."""
        start = rank.place
        while rank.place < len(rank.tape.events):
            if rank.place in rank.tape.steps:
                rank.begun.append(rank.now)
            if not self._do(rank):
                if rank.place in rank.tape.steps:
                    rank.begun.pop()
                break
            rank.place += 1
        return rank.place > start

    def _do(self, rank: _Playing) -> bool:
        event = rank.tape.events[rank.place]
        if isinstance(event, Compute):
            self._span(rank.tape.rank, GPU_LANE, event.part, rank.now, rank.now + event.seconds)
            rank.now += event.seconds
        elif isinstance(event, Call):
            self._post(rank, event)
        elif isinstance(event, Wait):
            key = rank.keys[event.call]
            if key not in self._done:
                return False
            if rank.in_last_step:
                self._waited[rank.tape.rank, rank.kinds[event.call]] += max(0.0, self._done[key] - rank.now)
            rank.now = max(rank.now, self._done[key])
        return True

    def _post(self, rank: _Playing, call: Call) -> None:
        key, group = rank.key(call), rank.tape.groups[call.group]
        posted = self._posted[key]
        posted[rank.tape.rank] = rank.now
        expected = set(key[1:3]) if call.kind in MESSAGES else set(group.ranks)
        if expected & self._ranks.keys() - posted.keys():
            return
        seconds, lane = _seconds(self._card, call, group, key), key[:3]
        begin = max(*posted.values(), self._free[lane])
        self._done[key] = self._free[lane] = begin + seconds
        for each in posted:
            self._span(each, group.name, call.kind, begin, begin + seconds)
            if rank.in_last_step:
                self._spent[each, rank.kinds[call.number]] += seconds

    def _span(self, rank: int, lane: str, name: str, begin: float, end: float) -> None:
        if end > begin:
            self._timeline.spans.append(Span(rank, lane, name, begin, end))


def _step_seconds(rank: _Playing) -> Iterator[float]:
    edges = [*rank.begun, rank.now]
    return (after - before for before, after in pairwise(edges))


def _seconds(card: Card, call: Call, group: Group, key: Key) -> float:
    if not group.on_gpu:
        return 0.0
    if call.kind in MESSAGES:
        return message(card, call.size, abs(key[1] - key[2]))
    size = len(group.ranks)
    stride = group.ranks[1] - group.ranks[0] if size > 1 else 1
    rounds = 2 if call.kind == "all_reduce" else 1
    return rounds * exchange(card, call.size, size, stride)
