"""What SIGTERM and Ctrl-C do."""

import signal

import pytest

from w2s.errors import StopRun
from w2s.stopping import SIGNALS, stop_at_once, stop_when_ready


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_steps_a_signal_stops_at_once(number: signal.Signals) -> None:
    with pytest.raises(StopRun, match=f"stopped by {number.name}") as caught, stop_at_once():
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number


def test_within_a_step_signals_are_noted_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_at_once():
        with stop_when_ready() as seen:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(StopRun):
            signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == before
