"""`w2s rehearse` on the command line."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from w2s import cli

SMALL = ["model=tiny", "teacher.source=eva:tiny", "data=shards", "data.lanes=8", "train.global_batch=8"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["w2s", "rehearse", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def shard(path: Path) -> None:
    """A shard with an image's name."""
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"jpg"))


@pytest.mark.parametrize("stage", ["eval", "model=tiny"])
def test_a_stage_that_is_not_trained_is_not_rehearsed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    assert run(monkeypatch, stage) == 2
    error = capsys.readouterr().err
    assert f"stage {stage} is not one that is rehearsed: use mim or clip, as in `w2s rehearse mim`" in error


def test_data_that_do_not_exist_are_what_the_run_would_end_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is told before any rank is rehearsed; none is here."""
    begun: list[int] = []
    monkeypatch.setattr(
        "w2s.rehearsal.rehearsal.perform", lambda be, jobs: begun.extend(job.rank for job in jobs) or []
    )
    missing = f"data.train={tmp_path / 'nowhere.tar'}"
    rank = ["--gpus", "2", "--ranks", "0"]
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "mim", *SMALL, missing, *rank) == 1
    printed = capsys.readouterr().out
    hint = "(where the shards are not on this machine, rehearse with --no-data)"
    assert f"wrong: {missing} does not exist: check the path {hint}\n" in printed, "one line, however long"
    assert "nothing is wrong" not in printed and not begun
    assert run(monkeypatch, "mim", *SMALL, missing, *rank, "--no-data") == 0
    assert begun == [0]
    assert "the data were not looked for\nnothing is wrong" in capsys.readouterr().out
    shard(tmp_path / "0.tar")
    assert run(monkeypatch, "mim", *SMALL, f"data.train={tmp_path}", "data.replacement=true", *rank, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["wrong"], found["looked_for_data"]) == ([], True)


def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_rehearsed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("w2s.rehearsal.rehearsal.perform", lambda *_: pytest.fail("it was begun"))
    path = tmp_path / "nowhere" / "trace.json"
    assert run(monkeypatch, "mim", *SMALL, "--gpus", "2", "--no-data", "--trace", str(path)) == 2
    assert f"--trace {path} cannot be written: there is no folder {path.parent}" in capsys.readouterr().err
