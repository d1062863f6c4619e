"""`w2s import`, `inspect` and `export` in a row."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.peers import released
from w2s import cli
from w2s.checkpoint.weights.released import Released
from w2s.config.load import load


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["w2s", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = load("clip", ["model=tiny"]).model
    weights = str(tmp_path / "clip.pt")
    torch.save(released(model), weights)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "import", weights, "--model", "tiny", "--out", "runs/start", "--image-size", "64") == 0
    output = capsys.readouterr().out
    assert re.search(r"resized +1 +vision\.pos_embed", output)
    assert run(monkeypatch, "inspect", "start") == 0
    assert "64 px in patches of 8" in capsys.readouterr().out
    assert run(monkeypatch, "export", "start", "--format", "open_clip", "--out", "clip") == 0
    output = capsys.readouterr().out
    code = output[output.index("import json, open_clip") :]
    assert "local-dir:clip" in code
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["model"].visual.image_size == (64, 64)
    assert run(monkeypatch, "export", "start", "--format", "timm", "--out", "clip") == 2
    assert capsys.readouterr().err == "error: --out clip exists already: choose another folder\n"
    assert run(monkeypatch, "import", "nowhere.pt", "--model", "tiny", "--out", "x") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_import_or_export_leaves_nothing(
    stop: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, reads, read = tmp_path / "clip.pt", [], Released.read
    torch.save(released(load("clip", ["model=tiny"]).model), weights)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "import", str(weights), "--model", "tiny", "--out", "start") == 0
    capsys.readouterr()

    def stopped(self: Released, name: str) -> torch.Tensor:
        reads.append(name)
        if len(reads) == 3:
            assert any(entry.name.endswith(".partial") for entry in tmp_path.iterdir())
            os.kill(os.getpid(), stop)
        return read(self, name)

    monkeypatch.setattr(Released, "read", stopped)
    commands = [("import", str(weights), "--model", "tiny")]
    commands += [("export", "start", "--format", name) for name in ("eva", "open_clip")]
    for command in commands:
        reads.clear()
        assert run(monkeypatch, *command, "--out", "out") == 128 + stop
        assert capsys.readouterr().err == f"error: stopped by {stop.name}: repeat the command to resume\n"
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["clip.pt", "start"]
