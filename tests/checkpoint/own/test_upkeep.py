"""`w2s checkpoint list`, `verify` and `prune`: what they print, remove and return."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.saved import meta, save
from w2s import cli
from w2s.checkpoint.own.checkpoint_folders import all_of, latest, point
from w2s.checkpoint.own.verifying import damage
from w2s.megatron.parallel.process_groups import Ranks

Command = Callable[..., tuple[int, list[str], str]]
FILE = "__0_1.distcp"


@pytest.fixture
def run(alone: Ranks, tmp_path: Path) -> Path:
    """A run `long` with checkpoints at five steps, of which the second is kept for other runs."""
    run = tmp_path / "long"
    for step in (2, 4, 6, 8, 10):
        save(run, meta(step, config={"checkpoint": {"keep_at": [4]}}), keep=5, ranks=alone)
    return run


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`w2s checkpoint` in this process: exit code, lines of standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["w2s", "checkpoint", *arguments, "--root", str(tmp_path)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out.splitlines(), output.err

    return call


def flip(run: Path, step: int) -> None:
    """Change a bit of a file, whose size stays."""
    path = run / "checkpoints" / f"step-{step:08d}" / FILE
    content = bytearray(path.read_bytes())
    content[7] ^= 4
    path.write_bytes(content)


def rows(lines: list[str]) -> dict[str, str]:
    return {line.split()[0]: line for line in lines if line.strip().startswith("step-")}


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in all_of(run)]


def test_list_shows_what_is_there(command: Command, run: Path) -> None:
    (run / "checkpoints" / "step-00000006" / FILE).write_bytes(b"")
    flip(run, 8)
    code, lines, error = command("list", "long")
    assert (code, error) == (0, "")
    found = rows(lines)
    assert list(found) == [path.name for path in all_of(run)]
    assert "damaged: __0_1.distcp has 0 of 20000 bytes" in found["step-00000006"]
    assert "whole" in found["step-00000008"], "no file is read"
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "step-00000010").iterdir())
    assert f" {size:,} " in found["step-00000010"]
    assert [name for name, line in found.items() if line.rstrip().endswith("latest")] == ["step-00000010"]


def test_verify_reads_everything(command: Command, run: Path) -> None:
    assert command("verify", str(run))[::2] == (0, "")
    flip(run, 8)
    code, lines, error = command("verify", str(run))
    assert code == 1
    assert error == f"error: 1 of 5 checkpoints of {run} are damaged: see above\n"
    assert lines[-1] == f"{run}/checkpoints/step-00000008: {FILE} has changed since it was written"


def test_prune_removes_what_is_damaged_or_old(command: Command, run: Path) -> None:
    flip(run, 10)
    (run / "checkpoints" / "step-00000001.damaged").mkdir()
    code, lines, error = command("prune", "long")
    assert (code, error) == (0, "")
    assert lines[0] == f"removed step-00000010: damaged: {FILE} has changed since it was written"
    assert lines[1].startswith("removed step-00000001.damaged: damaged: manifest.json is missing")
    assert steps(run) == [2, 4, 6, 8]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000008"
    code, lines, _ = command("prune", "long", "--keep", "1")
    assert code == 0
    assert steps(run) == [4, 8], "the last whole one, and the one that is kept for other runs"
    assert sum(line.startswith("removed step-") for line in lines) == 2
    found = latest(run)
    assert found is not None
    assert (found.name, damage(found)) == ("step-00000008", [])


def test_prune_keeps_what_the_run_resumes_from(command: Command, run: Path) -> None:
    point(run, all_of(run)[0])
    assert command("prune", "long", "--keep", "1")[0] == 0
    assert steps(run) == [2, 4, 10]


def test_prune_removes_nothing_where_nothing_is_whole(command: Command, run: Path) -> None:
    for step in steps(run):
        flip(run, step)
    code, lines, error = command("prune", "long", "--keep", "1")
    assert (code, lines) == (2, [])
    assert error == f"error: no checkpoint of {run} is whole: nothing is removed\n"
    assert len(steps(run)) == 5


@pytest.mark.parametrize("name", ["list", "verify", "prune"])
def test_a_run_that_is_not_there(name: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for what in ("nowhere", "empty"):
        code, lines, error = command(name, what)
        assert (code, lines) == (2, [])
        assert error == (
            f"error: RUN={what} is not a run with a checkpoint, nor one below {tmp_path}: see `ls {tmp_path}`\n"
        )
