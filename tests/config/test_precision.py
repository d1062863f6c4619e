"""Which linear layers a run takes, and which of them stay without FP8."""

import pytest

from tests.config.test_fp8_checks import AMPERE, HOPPER, machine
from w2s.config.gpu import Card
from w2s.config.precision import LinearChoice, bf16_layers, choose_linears
from w2s.config.sections import HardwareConfig, PrecisionConfig


@pytest.mark.parametrize(
    ("card", "engine", "device", "implementation", "reason"),
    [
        (HOPPER, True, "auto", "te", "NVIDIA H100 with Transformer Engine"),
        (HOPPER, True, "cpu", "local", "hardware.device=cpu"),
        (HOPPER, False, "auto", "local", "Transformer Engine is not installed (pip install 'w2s[gpu]')"),
        (AMPERE, True, "auto", "local", "NVIDIA A100 is older than Hopper"),
        (None, True, "auto", "local", "there is no GPU"),
    ],
)
def test_auto_takes_transformer_engine_on_hopper(
    monkeypatch: pytest.MonkeyPatch, card: Card | None, engine: bool, device: str, implementation: str, reason: str
) -> None:
    machine(monkeypatch, card, engine)
    hardware = HardwareConfig(device=device)  # type: ignore[arg-type]
    assert choose_linears(PrecisionConfig(), hardware) == LinearChoice(implementation, reason)  # type: ignore[arg-type]
    assert choose_linears(PrecisionConfig(linear="local"), hardware).implementation == "local"
    assert choose_linears(PrecisionConfig(fp8="emulated"), hardware).implementation == "local"


def test_layers_that_stay_in_bf16() -> None:
    precision = PrecisionConfig(fp8_bf16_first=1, fp8_bf16_last=2, fp8_bf16_layers=["text.3", "vision.5"])
    assert bf16_layers(precision, "vision", 12) == {0, 5, 10, 11}
    assert bf16_layers(precision, "text", 8) == {0, 3, 6, 7}
