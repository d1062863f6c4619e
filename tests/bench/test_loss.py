import json

import pytest

from w2s import cli
from w2s.bench import loss
from w2s.bench.call_cost import Cost


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["w2s", "bench", "loss", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_ours_beside_the_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--batch", "2048", "--repeats", "1", "--json", monkeypatch=monkeypatch) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    assert (report["width"], row["batch"]) == (1024, 2048)
    # The gradients alone are 16 MiB; the peer has at least two matrices of logits and their softmaxes, 16 MiB each.
    assert row["ours"]["mib"] > 16
    assert row["peer"]["mib"] > 64
    assert row["memory_ratio"] == pytest.approx(row["ours"]["mib"] / row["peer"]["mib"])
    assert row["time_ratio"] == pytest.approx(row["ours"]["seconds"] / row["peer"]["seconds"])


def test_medians_of_turns_and_ours_alone_above_the_peers_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def cost_of(name: str, batch: int) -> Cost:
        calls.append((name, batch))
        seconds = {"ours": [1, 9, 2], "peer": [4, 3, 100]}[name][(len(calls) - 1) // 2]
        return Cost(seconds, 10 * seconds)

    monkeypatch.setattr(loss, "_cost_of", cost_of)
    row = loss.measure(1024, repeats=3)
    assert calls == 3 * [("ours", 1024), ("peer", 1024)]
    assert row == loss.Row(1024, Cost(2, 20), Cost(4, 40), time_ratio=0.5, memory_ratio=0.5)
    calls.clear()
    assert loss.measure(2 * loss.PEER_LARGEST, repeats=3).peer is None
    assert calls == [("ours", 2 * loss.PEER_LARGEST)]


def test_a_batch_that_is_lost_in_the_noise_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--batch", "10", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: Invalid value for '--batch'")
