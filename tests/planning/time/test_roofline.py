"""Products, collectives and messages on a card, against sums by hand."""

import pytest

from w2s.planning.time.cards import card
from w2s.planning.time.roofline import exchange, message, moving, product, ring_bandwidth

H100 = card("h100")
NVLINK, ADAPTER = H100.bandwidth(within_node=True), H100.bandwidth(within_node=False)


def test_a_product_of_whole_waves_runs_at_a_share_of_the_measured_rate() -> None:
    rows, columns = 128 * 12, 256 * 11  # 132 tiles on 132 processors
    best = 2 * rows * columns * 8192 / (794e12 * H100.estimates.products)
    assert product(H100, rows, 8192, columns, fp8=False) == pytest.approx(best)
    # One row more: 286 small tiles are three waves of them, half as large and a tenth slower.
    assert product(H100, rows + 1, 8192, columns, fp8=False) == pytest.approx(3 / 2 / 0.9 * best)
    assert product(H100, rows, 8192, columns, fp8=True) == pytest.approx(best * 794 / 1403)


def test_a_flat_product_waits_for_memory() -> None:
    """Of one row, a weight matrix of 5120 x 25600 in bfloat16 has to come from memory."""
    moved = 2 * 5120 * (1 + 25600) + 2 * 25600
    assert product(H100, 1, 5120, 25600, fp8=False) == pytest.approx(moving(H100, moved))


def test_rings_go_over_nvlink_or_over_the_adapters_of_their_members() -> None:
    assert ring_bandwidth(H100, 8, 1) == NVLINK
    assert ring_bandwidth(H100, 2, 4) == NVLINK
    # 64 ranks in order: eight adapters a node, 300 GB/s, are less than NVLink.
    assert ring_bandwidth(H100, 64, 1) == 8 * ADAPTER < NVLINK
    assert ring_bandwidth(H100, 32, 4) == 2 * ADAPTER
    assert ring_bandwidth(H100, 32, 8) == ring_bandwidth(H100, 4, 64) == ADAPTER


def test_what_a_collective_sends() -> None:
    assert exchange(H100, 8e9, 1, 1) == 0
    assert exchange(H100, 8e9, 8, 1) == pytest.approx(7e9 / NVLINK)
    assert message(H100, 1e9, 4) == pytest.approx(1e9 / NVLINK)
    assert message(H100, 1e9, 8) == pytest.approx(1e9 / ADAPTER)
