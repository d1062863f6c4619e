"""What a rank of a rehearsal does, in order: it computes, posts calls to other ranks, and waits for them."""

from dataclasses import dataclass, field

MESSAGES = ("send", "receive")
"""The kinds of calls that have one peer; all others are collectives."""


@dataclass(frozen=True)
class Group:
    """A process group."""

    name: str
    """What it is for."""
    ranks: tuple[int, ...]
    """Its ranks in the world."""
    on_gpu: bool
    """Whether its ranks talk from GPU to GPU."""


@dataclass
class Compute:
    """Work on the GPU that waits for nobody."""

    part: str
    """Of the step: one of `w2s.bench.parts.PARTS`, or `rest`."""
    seconds: float


@dataclass(frozen=True)
class Call:
    """A collective, or a message, that a rank begins."""

    number: int
    """Of this rank's calls, from 0."""
    kind: str
    """`all_reduce`, `all_gather`, ..., `send` or `receive`."""
    group: int
    """Number of the group in the tape."""
    tensors: tuple[str, ...]
    """Type and shape of what goes in."""
    size: int
    """Bytes of the whole: what every rank has at the end, or had at the beginning."""
    where: str
    """The line of code."""
    part: str
    """Of the step."""
    peer: int = -1
    """Rank in the world that a message goes to or comes from."""
    reduction: str = ""
    """How a collective joins what goes in."""
    batch: int = -1
    """Messages of a batch begin together, in no order."""

    @property
    def meaning(self) -> str:
        """What all ranks of a group must agree in."""
        how = f" ({self.reduction})" if self.reduction else ""
        return f"{self.kind}{how} of {' and '.join(self.tensors) or 'nothing'}"


@dataclass(frozen=True)
class Wait:
    """The GPU continues when a call is done."""

    call: int
    where: str


@dataclass(frozen=True)
class HostWait:
    """The host waits until the GPU has done all that it was given."""

    what: str
    where: str


Event = Compute | Call | Wait | HostWait


@dataclass
class Tape:
    """What a rank does.

    Attributes:
        rank: in the world.
        groups: those that the rank is in, by number; a group has the same number on all its ranks.
        events: in order.
        steps: numbers of the events with which the steps begin.
    """

    rank: int
    groups: dict[int, Group] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def compute(self, part: str, seconds: float) -> None:
        """Add work; work of a part without a call in between is one event."""
        last = self.events[-1] if self.events else None
        if isinstance(last, Compute) and last.part == part:
            last.seconds += seconds
        else:
            self.events.append(Compute(part, seconds))

    @property
    def last_step(self) -> list[Event]:
        """Its events."""
        return self.events[self.steps[-1] :] if self.steps else []

    def calls(self) -> list[Call]:
        """Return the calls in order."""
        return [event for event in self.events if isinstance(event, Call)]
