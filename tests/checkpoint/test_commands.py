"""`w2s import`, `inspect` and `export` in a row."""

import sys
from pathlib import Path

import open_clip
import pytest
import torch

from tests.checkpoint.peers import released
from w2s import cli
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
    assert "resized      1         vision.pos_embed" in output
    assert run(monkeypatch, "inspect", "start") == 0
    assert "64 px in patches of 8" in capsys.readouterr().out
    assert run(monkeypatch, "export", "start", "--format", "open_clip", "--out", "clip") == 0
    capsys.readouterr()
    assert open_clip.create_model("local-dir:clip").visual.image_size == (64, 64)
    assert run(monkeypatch, "export", "start", "--format", "timm", "--out", "clip") == 2
    assert capsys.readouterr().err == "error: --out clip exists already: choose another folder\n"
    assert run(monkeypatch, "import", "nowhere.pt", "--model", "tiny", "--out", "x") == 2
    assert capsys.readouterr().err.count("\n") == 1
