"""What a checkpoint in the memory of the hosts needs (`checkpoint.memory`)."""

from dataclasses import dataclass

from w2s.planning.cards import Card
from w2s.planning.states import States

_COPY_GBS = 1.1
"""A rank's tensors into memory of its host, with their checksum: measured on one core (docs/reliability.md)."""
_COPIES = 4
"""On the host, for each of its ranks: its own part and that of a rank of the host before, of two checkpoints."""


@dataclass(frozen=True)
class HostCopy:
    """Of the rank that has most."""

    bytes: int
    """A checkpoint's part."""
    held: int
    """What the host's memory has to hold for this rank."""
    seconds: float
    """A save, in which training waits; on its way to the next host as fast as the network is."""


def host_copy(card: Card, states: States) -> HostCopy:
    """Plan a rank's part: weights, master weights and moments.

    Args:
        card: the GPUs.
        states: the rank's.
    """
    own = states.weights + states.optimizer
    return HostCopy(own, _COPIES * own, own / (1e9 * _COPY_GBS) + own / (1e9 * card.network_gbs))
