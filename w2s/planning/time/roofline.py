"""Seconds of the operations that a step is made of, each on one card.

A product runs at the card's best measured rate in whole waves of tiles over the processors (NVIDIA, Matrix
Multiplication Background User's Guide: 100 tiles on 132 processors take as long as 132), or as fast as its matrices
come from memory (Williams et al. 2009). An elementwise operation moves its bytes. A collective over a ring of n ranks
sends (n - 1) / n of its bytes through the slowest link, an all-reduce twice that (Patarasuk and Yuan 2009).
"""

import math
from functools import cache

from w2s.planning.time.cards import GPUS_PER_NODE, Card

TILES = {(128, 256): 1.0, (128, 128): 0.9}
"""Rows and columns that a processor computes at a time, and the rate that is reached with them: the smaller tile
fetches more a product. cuBLAS takes what is faster. ESTIMATE."""


@cache
def product(card: Card, rows: int, inner: int, columns: int, fp8: bool, result: int = 2) -> float:
    """Seconds of [rows, inner] x [inner, columns]; `result` bytes are moved for a value of the result."""
    best = card.fp8_gemm if fp8 else card.bf16_gemm
    rate = 1e12 * best * card.estimates.products / card.processors
    computing = min(
        _waves(card, rows, columns, *tile) * 2 * math.prod(tile) * inner / share for tile, share in TILES.items()
    )
    moved = (1 if fp8 else 2) * inner * (rows + columns) + result * rows * columns
    return max(computing / rate, moving(card, moved))


def _waves(card: Card, rows: int, columns: int, tall: int, wide: int) -> int:
    return math.ceil(math.ceil(rows / tall) * math.ceil(columns / wide) / card.processors)


def moving(card: Card, count: float) -> float:
    """Seconds in which an elementwise kernel reads and writes bytes."""
    return count / card.memory_bandwidth


def exchange(card: Card, count: float, size: int, stride: int) -> float:
    """Seconds of an all-gather or a reduce-scatter over a ring of ranks; an all-reduce takes two of them.

    Args:
        card: the card.
        count: bytes of the whole.
        size: ranks of the group.
        stride: distance between its ranks; eight ranks in order are a node.
    """
    return (size - 1) / size * count / ring_bandwidth(card, size, stride) if size > 1 else 0.0


def ring_bandwidth(card: Card, size: int, stride: int) -> float:
    """Bytes that go through every link of a ring in a second.

    Within a node that is NVLink. A ring over several nodes enters and leaves each through the network adapters of its
    members there.
    """
    fast = card.bandwidth(within_node=True)
    if size * stride <= GPUS_PER_NODE:
        return fast
    return min(fast, max(1, GPUS_PER_NODE // stride) * card.bandwidth(within_node=False))


def message(card: Card, count: float, distance: int) -> float:
    """Seconds of a message between two ranks that are `distance` apart."""
    return count / card.bandwidth(within_node=distance < GPUS_PER_NODE)
