"""What a checkpoint in the memory of the hosts needs (`checkpoint.memory`)."""

from dataclasses import dataclass

from w2s.planning.memory.states import States
from w2s.planning.time.cards import GPUS_PER_NODE, Card

CHECKSUM_GBS = 1.1
"""A rank's tensors into memory of its host, with their checksum: measured on one core (docs/reliability.md)."""
_GENERATIONS = 2
"""Checkpoints that are there while the newer one is written."""


@dataclass(frozen=True)
class HostCopy:
    """Of the rank that has most."""

    bytes: int
    """A checkpoint's part."""
    held: int
    """What the host's memory has to hold for this rank and, where there are several hosts, one of the host before."""
    seconds: float
    """A save, in which training waits; on its way to the next host as fast as the network is."""


def host_copy(card: Card, states: States, gpus: int) -> HostCopy:
    """Plan a rank's part: weights, master weights, moments, and an average of the weights if there is one."""
    size, several = states.weights + states.optimizer + states.average, gpus > GPUS_PER_NODE
    sent = size / (1e9 * card.network_gbs) if several else 0.0
    return HostCopy(size, _GENERATIONS * (1 + several) * size, size / (1e9 * CHECKSUM_GBS) + sent)
