"""Reading processes that are killed."""

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.data.shard_files import write_shards
from w2s.config.sections import DataConfig
from w2s.data.sample import SampleSpec
from w2s.data.stream import Stream
from w2s.errors import DataError

SPEC = SampleSpec(image_size=8, grid=2, image_key="png")
BATCH = 8
KILLS = 20
STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    write_shards(root / "a", [9, 7, 11, 8])
    write_shards(root / "b", [5, 6, 4, 3])
    return root


def open_stream(folder: Path, workers: int, position: object = None) -> Stream:
    data = DataConfig(train=f"{folder}/a;{folder}/b", weights=[0.6, 0.4], lanes=4, shuffle=6, workers=workers)
    return Stream(data, SPEC, global_batch=BATCH, seed=2, rank=0, size=1, position=position)  # type: ignore[arg-type]


def read_and_note(folder: Path, notes: Path) -> None:
    """Read on from the last whole line of `notes`, and note keys and position of every batch in a line."""
    lines = _whole_lines(notes)
    notes.write_text("".join(lines))
    position = json.loads(lines[-1])["position"] if lines else None
    with closing(open_stream(folder, 0, position)) as stream, notes.open("a") as file:
        for _ in range(len(lines), STEPS):
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
    context.set_forkserver_preload(["w2s.data.stream"])
    notes = tmp_path / "notes"
    notes.touch()
    draw = random.Random(0)
    for kill in range(1, KILLS + 1):
        process = context.Process(target=read_and_note, args=(folder, notes))
        process.start()
        # Killed in a random part of the step after one to three more, and never before some progress was made.
        goal = min(len(_whole_lines(notes)) + draw.randint(1, 3), STEPS - 1)
        while len(_whole_lines(notes)) < goal:
            process.join(draw.uniform(0.0005, 0.003))
            assert process.exitcode in (None, 0)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert kill <= len(_whole_lines(notes))
    read_and_note(folder, notes)
    assert [json.loads(line)["keys"] for line in _whole_lines(notes)] == list(uninterrupted(folder))


def test_a_killed_worker_is_started_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = list(uninterrupted(folder))
    with closing(open_stream(folder, 2)) as stream:
        seen = [stream.next().keys for _ in range(3)]
        os.kill(stream._parts._workers[1].pid, signal.SIGKILL)  # type: ignore[attr-defined]
        seen += [stream.next().keys for _ in range(STEPS - 3)]
    assert seen == expected
    assert "a reading process died, step" in caplog.text


def test_workers_that_die_again_and_again_are_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*_: object) -> Iterator[object]:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        yield

    with closing(open_stream(folder, 0)) as stream:
        monkeypatch.setattr("w2s.data.stream.start_reading", dying)
        stream._parts = iter(dying())  # type: ignore[arg-type]
        with pytest.raises(DataError, match="reading processes die again and again, at step 0"):
            stream.next()
