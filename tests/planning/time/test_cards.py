"""What is known of GPUs hangs together."""

import pytest

from w2s.errors import UserError
from w2s.planning.time.cards import card, cards


@pytest.mark.parametrize("name", cards())
def test_software_gets_less_than_the_data_sheet_promises(name: str) -> None:
    found = cards()[name]
    assert 0.6 < found.bf16_gemm / found.bf16_tflops < 0.95
    if found.fp8_tflops:
        # Data sheets round the two peaks apart (989 and 1979).
        assert found.fp8_tflops == pytest.approx(2 * found.bf16_tflops, rel=1e-3)
        assert 0.6 < found.fp8_gemm / found.fp8_tflops < 0.95
    assert found.usable_bytes < found.memory_gib * 2**30
    assert found.bandwidth(within_node=True) > 5 * found.bandwidth(within_node=False)
    assert found.memory_bandwidth < found.hbm_tbs * 1e12


def test_an_unknown_card_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean h100.*a100-40, a100-80, h100, h200, b200"):
        card("h10")
