"""Random numbers that depend on what they are for and on a count, never on a process or on what was drawn before."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a random number decides. The values are part of the sample order: never renumber them."""

    SHARDS = 0
    WINDOW = 1
    CROP = 2
    MASK = 3
    PATCHES = 4
    SOURCE = 5
    CAPTION = 6
    SOURCE_SEED = 7
    BRANCHES = 8
    TEACHER = 9


def generator(seed: int, purpose: Purpose, first: int, second: int = 0) -> np.random.Generator:
    """Return the generator of one decision; equal arguments give equal numbers on every rank and worker.

    Philox is a counter-based generator, so a jump to any (purpose, first, second) costs nothing and streams of
    2**64 blocks never overlap (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        seed: seed of the run, taken modulo 2**64.
        purpose: what is decided.
        first: what the decision is about, such as a global sample index; not negative.
        second: a second count; not negative.
    """
    key = np.array([seed % 2**64, 0], dtype=np.uint64)
    counter = np.array([0, first, second, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def source_seed(seed: int, source: int) -> int:
    """Return a seed for the shards and windows of one of a run's sources, so that equal sources go different ways."""
    return int(generator(seed, Purpose.SOURCE_SEED, source).integers(2**63))
