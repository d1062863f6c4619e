"""Reading processes that are killed."""

import json
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.data.shard_files import write_shards
from tests.running import running_after
from w2s.config.sections import DataConfig
from w2s.data.samples.sample import SampleSpec
from w2s.data.stream.stream import Stream
from w2s.errors import DataError

SPEC = SampleSpec(image_size=8, grid=2, image_key="png")
BATCH = 8
KILLS = 20
STEPS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    write_shards(root / "a", [9, 7, 11, 8])
    write_shards(root / "b", [5, 6, 4, 3])
    return root


def open_stream(folder: Path, workers: int, position: object = None) -> Stream:
    data = DataConfig(train=f"{folder}/a;{folder}/b", weights=[0.6, 0.4], lanes=4, shuffle=6, workers=workers)
    return Stream(data, SPEC, global_batch=BATCH, seed=2, rank=0, size=1, position=position)  # type: ignore[arg-type]


def read_and_note(folder: Path, notes: Path, killed: tuple[int, float] | None = None) -> None:
    """Read on from the last whole line of `notes`, and note keys and position of every batch in a line.

    Args:
        folder: the shards.
        notes: file of the lines.
        killed: after so many new lines, and then so many seconds, this process is killed.
    """
    lines = _whole_lines(notes)
    whole = notes.with_suffix(".whole")
    whole.write_text("".join(lines))
    whole.replace(notes)
    position = json.loads(lines[-1])["position"] if lines else None
    with closing(open_stream(folder, 0, position)) as stream, notes.open("a") as file:
        for step in range(len(lines), STEPS):
            if killed is not None and step - len(lines) == killed[0]:
                threading.Timer(killed[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
            line = {"keys": stream.next().keys, "position": stream.position()}
            file.write(json.dumps(line) + "\n")
            file.flush()


def _whole_lines(notes: Path) -> list[str]:
    return [line for line in notes.read_text().splitlines(keepends=True) if line.endswith("\n")]


def uninterrupted(folder: Path) -> Iterator[list[str]]:
    with closing(open_stream(folder, 0)) as stream:
        for _ in range(STEPS):
            yield stream.next().keys


def test_twenty_kills_lose_and_repeat_nothing(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["w2s.data.stream.stream"])
    notes = tmp_path / "notes"
    notes.touch()
    draw = random.Random(0)
    for _ in range(KILLS):
        killed = draw.randint(1, 3), draw.uniform(0, 0.01)
        process = context.Process(target=read_and_note, args=(folder, notes, killed))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert KILLS <= len(_whole_lines(notes)) < STEPS
    read_and_note(folder, notes)
    assert [json.loads(line)["keys"] for line in _whole_lines(notes)] == list(uninterrupted(folder))


def test_a_killed_worker_is_started_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = list(uninterrupted(folder))
    with closing(open_stream(folder, 2)) as stream:
        seen = [stream.next().keys for _ in range(3)]
        os.kill(stream._parts._workers[1].pid, signal.SIGKILL)  # type: ignore[attr-defined]
        seen += [stream.next().keys for _ in range(57)]
    assert seen == expected[:60]
    assert "a reading process died, step" in caplog.text


@pytest.mark.slow  # it is waited for, ten seconds
def test_a_stopped_worker_does_not_stay(folder: Path) -> None:
    with closing(open_stream(folder, 2)) as stream:
        stream.next()
        workers = [psutil.Process(pid) for pid in stream.reader_pids()]
        workers[0].suspend()
    assert not running_after(workers, 10)


def test_workers_that_die_again_and_again_are_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*_: object) -> Iterator[object]:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        yield

    with closing(open_stream(folder, 0)) as stream:
        monkeypatch.setattr("w2s.data.stream.stream.start_workers", dying)
        stream._parts = iter(dying())  # type: ignore[arg-type]
        with pytest.raises(DataError, match="reading processes die again and again, at step 0"):
            stream.next()
