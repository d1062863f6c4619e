"""Shards of a web server that is slow, stuck, away for a while, or cuts its connections."""

import io
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.data.shard_files import encode, noise, write_shard, write_shards
from tests.data.web import Faults, serve
from w2s.config.sections import DataConfig
from w2s.data.samples.sample import SampleSpec
from w2s.data.shards.containers import read_shard
from w2s.data.shards.sizes import count_samples
from w2s.data.shards.storage import WAITS, SourceConnection, open_at
from w2s.data.stream.sources import Source, list_sources
from w2s.data.stream.stream import Stream

SPEC = SampleSpec(image_size=8, grid=2, image_key="png")
SIZES = [30, 20, 25, 35]
BATCH = 8
STEPS = 14


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a server is waited for, without waiting."""
    pauses: list[float] = []
    monkeypatch.setattr("w2s.data.shards.storage.SourceConnection.pause", lambda _, seconds: pauses.append(seconds))
    return pauses


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Faults]]:
    with serve(write_shards(tmp_path / "a", SIZES)) as (url, faults):
        yield url, faults


def open_stream(train: str, sources: Sequence[Source] | None = None, **changes: Any) -> Stream:
    settings: dict[str, Any] = {"lanes": 4, "shuffle": 16, "workers": 0, "max_bad_fraction": 1.0}
    data = DataConfig(train=train, **(settings | changes))
    return Stream(data, SPEC, global_batch=BATCH, seed=3, rank=0, size=1, sources=sources)


def keys(stream: Stream) -> list[list[str]]:
    with closing(stream):
        return [stream.next().keys for _ in range(STEPS)]


def shards(url: str) -> str:
    return f"{url}/{{000000..000003}}.tar"


def test_cut_connections_cost_nothing_but_connections(
    web: tuple[str, Faults], tmp_path: Path, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    url, faults = web
    expected = keys(open_stream(str(tmp_path / "a")))
    faults.most = 10_000
    stream = open_stream(shards(url))
    with caplog.at_level(logging.WARNING, logger="w2s.data.stream.stream"):
        assert keys(stream) == expected
    assert "connection was cut (2 so far)" in caplog.text
    # Each of the four shards has some 70,000 bytes, and most of them are read.
    assert stream.reopened["connection was cut"] >= 12
    assert set(stream.reopened) == {"connection was cut"}
    assert not stream.bad and not pauses


def test_each_stall_is_counted_and_its_byte_is_named(web: tuple[str, Faults]) -> None:
    url, faults = web
    faults.stalls = [9_000, 20_000]
    link = SourceConnection(timeout=0.2)
    assert [sample.damage for sample in read_shard(f"{url}/000003.tar", link=link)] == [""] * SIZES[3]
    broken = link.take().broken
    assert [(each.key, each.reason) for each in broken] == [
        ("byte 20000", "connection stalled"),
        ("byte 29000", "connection stalled"),
    ]
    assert link.take().broken == []


def test_a_server_that_is_away_for_a_minute_costs_time_alone(
    web: tuple[str, Faults], tmp_path: Path, pauses: list[float]
) -> None:
    url, faults = web
    stream = open_stream(shards(url))
    with closing(stream):
        first = stream.next().keys
        # A minute of refusals for one lane: what is asked in 60 s.
        faults.refusals = [503] * 8
        rest = [stream.next().keys for _ in range(STEPS - 1)]
    assert [first, *rest] == keys(open_stream(str(tmp_path / "a")))
    assert sum(WAITS) > 60
    assert stream.reopened["status 503"] == 8 and not stream.bad
    assert sum(pauses) > 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_is_away_for_a_real_minute_loses_nothing(
    web: tuple[str, Faults], tmp_path: Path, workers: int
) -> None:
    url, faults = web
    with closing(open_stream(shards(url), workers=workers)) as stream:
        first = stream.next().keys
        faults.away_until = time.monotonic() + 60
        rest = [stream.next().keys for _ in range(STEPS - 1)]
        assert time.monotonic() > faults.away_until, "the whole epoch had been read before"
    assert [first, *rest] == keys(open_stream(str(tmp_path / "a")))
    # A lane asks again after 0.5, 1, 2, 4, 8, 15, 15 and 15 s, then the server is back.
    assert set(stream.reopened) == {"status 503"} and stream.reopened["status 503"] >= 8
    assert not stream.bad


@pytest.mark.slow
def test_a_server_that_cuts_each_connection_after_a_megabyte_loses_nothing(tmp_path: Path) -> None:
    """Shards of 4 MB take at least four connections each."""
    (tmp_path / "a").mkdir()
    for shard, size in enumerate(SIZES):
        files = [{"png": encode(noise(100 * shard + n, 210, 210))} for n in range(size)]
        write_shard(tmp_path / "a" / f"{shard:06d}.tar", [(f"{shard}-{n}", each) for n, each in enumerate(files)])
    sizes = [path.stat().st_size for path in sorted((tmp_path / "a").iterdir())]
    expected = keys(open_stream(str(tmp_path / "a")))
    with serve(tmp_path / "a") as (url, faults):
        faults.most = 1_000_000
        stream = open_stream(shards(url))
        assert keys(stream) == expected
    assert set(stream.reopened) == {"connection was cut"} and not stream.bad
    # All but the end of the next epoch's windows is read once; a cut comes after each full megabyte.
    assert stream.reopened["connection was cut"] >= sum(size // 1_000_000 for size in sizes) - len(sizes)


def test_a_server_that_never_answers_loses_its_shards_and_holds_up_nothing(
    web: tuple[str, Faults], pauses: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, faults = web
    faults.stalls = [0] * 3
    link = SourceConnection(timeout=0.1, waits=(1.0, 1.0))
    (sample,) = read_shard(f"{url}/000001.tar", link=link)
    assert sample.damage == "shard cannot be read"
    assert [each.reason for each in link.take().broken] == ["connection stalled"] * 3
    monkeypatch.setattr(
        "w2s.data.stream.reader.SourceConnection", lambda timeout: SourceConnection(timeout, waits=(1.0, 1.0))
    )
    # 127.0.0.1:9 has no server.
    stream = open_stream(f"{shards(url)},http://127.0.0.1:9/gone/{{0..3}}.tar", lanes=4)
    with caplog.at_level(logging.WARNING, logger="w2s.data.stream.stream"), closing(stream):
        seen = {key for _ in range(STEPS) for key in stream.next().keys}
    assert stream.bad["shard cannot be read"] >= 2
    assert len(seen) > 60
    assert "127.0.0.1:9/gone" in caplog.text


def test_all_lanes_read_at_once(web: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers the first four requests together: lanes that read one after the other would get nothing."""
    url, _ = web
    sources = list_sources(DataConfig(train=shards(url)))
    together = threading.Barrier(4)

    def send(handler: Any, file: Any) -> None:
        if not together.broken:
            together.wait(20)
        handler.wfile.write(file.read())

    monkeypatch.setattr("tests.data.web._Handler.send_body", send)
    with closing(open_stream(shards(url), sources)) as stream:
        assert len(stream.next()) == BATCH
    assert not together.broken


def test_names_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start asks for the shards that are read, and for what counts them all, whatever the number of names."""
    with serve(write_shards(tmp_path / "a", [40])) as (url, faults):
        monkeypatch.setattr("tests.data.web._Handler.translate_path", lambda *_: str(tmp_path / "a" / "000000.tar"))
        stream = open_stream(f"{url}/{{000000..099999}}.tar", lanes=8, shuffle=16)
        with closing(stream):
            assert len(stream.sources[0].shards) == 100_000
            assert len(stream.next()) == BATCH
            assert count_samples(stream.sources[0].shards, tmp_path) is None
        assert faults.asked["sizes.json"] == faults.asked["__len__"] == 1
        # One of each lane, and one that was looked into.
        assert sum(faults.asked.values()) == 2 + 8 + 1


def test_a_web_servers_errors_are_not_taken_for_a_missing_shard(web: tuple[str, Faults], pauses: list[float]) -> None:
    url, faults = web
    faults.refusals = [503] * 4
    assert [sample.damage for sample in read_shard(f"{url}/000000.tar")] == [""] * SIZES[0]
    faults.refusals = [503] * 100
    assert [sample.damage for sample in read_shard(f"{url}/000000.tar")] == ["shard cannot be read"]
    assert len(faults.refusals) == 100 - 1 - len(WAITS)
    faults.refusals = []
    assert [sample.damage for sample in read_shard(f"{url}/none.tar")] == ["shard is gone"]
    assert [sample.damage for sample in read_shard("http://127.0.0.1:1/none.tar")] == ["shard cannot be read"]


def test_nothing_comes_behind_the_end(web: tuple[str, Faults]) -> None:
    url, faults = web
    faults.refusals = [416]
    with open_at(f"{url}/000001.tar", 10**6, SourceConnection()) as file:
        assert file.read() == b""
    with open_at(f"{url}/000001.tar", 0, SourceConnection()) as file:
        file.seek(-1024, io.SEEK_END)
        assert file.read() == bytes(1024)
    assert faults.asked["000001.tar"] <= 3


def test_a_command_that_gives_nothing_is_ended_and_run_again(tmp_path: Path, pauses: list[float]) -> None:
    shard = write_shards(tmp_path / "a", [6]) / "000000.tar"
    first = f"test -e {tmp_path}/once || {{ touch {tmp_path}/once; head -c 5000 {shard}; exec sleep 100; }}"
    link = SourceConnection(timeout=0.5)
    assert [sample.damage for sample in read_shard(f"pipe:{first}; cat {shard}", link=link)] == [""] * 6
    assert [each.reason for each in link.take().broken] == ["connection stalled"]
    link = SourceConnection()
    assert [each.damage for each in read_shard(f"pipe:head -c 5000 {shard}; exit 3", link=link)][-1:] != [""]
    assert link.take().broken[0].reason == "exit code 3"


def test_logins_and_spaces_of_a_url(tmp_path: Path) -> None:
    write_shards(tmp_path / "a b", [3])
    with serve(tmp_path) as (url, _):
        signed = url.replace("http://", "http://me:pass%20word@")
        assert len(list(read_shard(f"{signed}/a b/000000.tar"))) == 3


def test_throughput_and_waiting_are_in_the_metrics(web: tuple[str, Faults]) -> None:
    stream = open_stream(shards(web[0]))
    stream.counts()
    with closing(stream):
        for _ in range(STEPS):
            stream.next()
        came = stream.counts()
        figures = stream.metrics(came)
        again = stream.metrics(stream.counts())
    name = stream.sources[0].name
    assert figures[f"source/{name}/mb_per_second"] == pytest.approx(came["0/bytes"] / 1e6 / came["seconds"])
    assert came["0/bytes"] >= STEPS * BATCH * 1000
    assert 0 < figures[f"source/{name}/wait"] <= 1
    assert again[f"source/{name}/wait"] == 0


def test_the_log_says_which_source_a_step_waited_for(
    web: tuple[str, Faults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url, faults = web
    monkeypatch.setattr("w2s.data.stream.stream._LONG", 0.2)
    write_shards(tmp_path / "quick", [400] * 4)
    faults.most = 20_000  # so that there are new connections all the time
    stream = open_stream(f"{tmp_path}/quick::{shards(url)}", weights=[0.5, 0.5], timeout=0.5, read_ahead_mb=0)
    with closing(stream), caplog.at_level(logging.WARNING, logger="w2s.data.stream.stream"):
        for step in range(STEPS):
            if step == 3:
                faults.stalls = [1]
            stream.next()
    line = next(line for line in caplog.messages if "waited" in line)
    assert f"{stream.sources[1].name} let a reading process wait" in line
