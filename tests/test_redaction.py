import json
from dataclasses import asdict
from pathlib import Path

import pytest

from w2s.config.load import load, to_yaml
from w2s.config.naming import difference, digest, run_folder, written
from w2s.data.shards.listing import shard_name
from w2s.data.shards.sizes import index_shards, read_index
from w2s.data.stream.sources import list_sources
from w2s.errors import DataError
from w2s.processes.failure import describe
from w2s.redaction import HIDDEN, identity, printable, redact, redacted, resolved
from w2s.tracking.tracker import Tracker

PASSWORD = "hunter2hunter2"
SIGNED = "https://host/a.tar?X-Amz-Date=20261127&X-Amz-Signature=0123abcd&X-Amz-Expires=60"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HIDDEN, "")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (f"https://me:{PASSWORD}@host/a.tar", "https://me:***@host/a.tar"),
        (f"https://{PASSWORD}@host/a.tar", "https://***@host/a.tar"),
        (f"postgresql+psycopg2://me:{PASSWORD}@host:5432/db", "postgresql+psycopg2://me:***@host:5432/db"),
        (SIGNED, "https://host/a.tar?***"),
        ("https://h/a.tar?sv=2024&se=2026&sig=ab%2Fc::https://h/b.tar?sig=d", "https://h/a.tar?***::https://h/b.tar?***"),
        (f"https://h/a.tar?file=3&token={PASSWORD}&x=1", "https://h/a.tar?file=3&token=***&x=1"),
        (f"pipe:curl -H 'Authorization: Bearer {PASSWORD}' https://h/a.tar", "pipe:curl -H 'Authorization: Bearer ***' https://h/a.tar"),
        (f"http://bob:pa/{PASSWORD}@word@host/x.tar", "http://bob:***@host/x.tar"),
        (f"s3://KEY:sec+ret/{PASSWORD}@bucket/a.tar", "s3://KEY:***@bucket/a.tar"),
        (f"https://h/a.tar?AWSAccessKeyId={PASSWORD}#token={PASSWORD}", "https://h/a.tar?AWSAccessKeyId=***#token=***"),
        (f"pipe:curl -u bob:{PASSWORD} https://h/a.tar", "pipe:curl -u bob:*** https://h/a.tar"),
        (f"pipe:curl -H 'X-Api-Key: {PASSWORD}' https://h/a.tar", "pipe:curl -H 'X-Api-Key: ***' https://h/a.tar"),
        (f"https://h/a.tar?key=AIza{PASSWORD}-{PASSWORD}&x=1", "https://h/a.tar?key=***&x=1"),
        # What is not a secret stays.
        ("https://h/get?key=a-folder/with-a-long-name.tar", "https://h/get?key=a-folder/with-a-long-name.tar"),
        ("abfs://container@account.dfs.core.windows.net/a.tar", "abfs://container@account.dfs.core.windows.net/a.tar"),
        ("https://h/get?file=a.tar&key=b", "https://h/get?file=a.tar&key=b"),
        ("http://host:5000/x/a@1.tar", "http://host:5000/x/a@1.tar"),
        ("train.steps=100: use 200?", "train.steps=100: use 200?"),
    ],
)  # fmt: skip
def test_credentials_of_urls(text: str, seen: str) -> None:
    assert redact(text) == redact(seen) == identity(text) == seen


def test_values_of_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {"MY_TOKEN": PASSWORD, "PLACE": str(tmp_path), "STEPS": "100000", "WHERE": "somewhere-else", "KIND": "cpu"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    text = " ".join(values.values())
    assert redact(text) == text.replace(PASSWORD, "${oc.env:MY_TOKEN}"), "a name says that it is secret"
    load("mim", [f"tracking.experiment=${{oc.env:{name}}}" for name in values])
    seen = redact(text)
    assert seen == text.replace(PASSWORD, "${oc.env:MY_TOKEN}").replace("somewhere-else", "${oc.env:WHERE}")
    assert resolved({"a": [seen]}) == {"a": [text.replace(PASSWORD, "${oc.env:MY_TOKEN}")]}
    assert identity(text) == text.replace(PASSWORD, "${oc.env:MY_TOKEN}"), "another place is another run"


def test_what_is_printed_is_what_is_meant() -> None:
    assert printable("a\x1b[31mb\nc\x9bd\u202ee\udc80é·") == "a\\x1b[31mb\\nc\\x9bd\\u202ee\\udc80é·"
    assert describe(DataError(f"bad \x1b]0;owned\x07 in https://me:{PASSWORD}@h/a.tar")) == (
        "bad \\x1b]0;owned\\x07 in https://me:***@h/a.tar",
        2,
    )


def test_a_run_writes_no_secret_and_is_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that a run leaves on disk and on the terminal, with a password in four places."""
    monkeypatch.setenv("STORE_PASSWORD", PASSWORD)
    monkeypatch.setenv("EXPERIMENT", "secret-experiment")
    options = [
        "data=shards",
        f"data.train=https://me:{PASSWORD}@host/x/{{0..3}}.tar",
        f"eval.shards=https://host/t.tar?X-Amz-Signature={PASSWORD}",
        "tracking.uri=postgresql://me:${oc.env:STORE_PASSWORD}@nowhere/db",
        "tracking.experiment=${oc.env:EXPERIMENT}",
        "tracking.enabled=false",
        f"run.root={tmp_path}",
    ]
    config = load("mim", options)
    assert config.tracking.experiment == "secret-experiment"
    assert config.data.train.startswith(f"https://me:{PASSWORD}@host/")
    tracker = Tracker(config, tmp_path / "run", main=True)
    tracker.message(f"reads {config.data.train}, logs to {config.tracking.uri}")
    tracker.table("t", ["a\x1b[2J"], [[config.data.train]], config.tracking.experiment)
    tracker.finish("FINISHED")
    (tmp_path / "run" / "meta.json").write_text(json.dumps(written(config)))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "meta.json", "t.json"} <= {path.name for path in files}
    texts = [path.read_text() for path in files] + list(capsys.readouterr())
    for text in texts:
        assert PASSWORD not in text and "secret-experiment" not in text and "\x1b[2J" not in text
    assert "${oc.env:EXPERIMENT}" in to_yaml(config)

    # The same run with another password, and after a look at what was written.
    changed = load("mim", [option.replace(PASSWORD, "another-word") for option in options])
    monkeypatch.setenv("STORE_PASSWORD", "another-word")
    assert run_folder(changed) == run_folder(config)
    assert difference(changed, resolved(written(config))) is None
    # Another value of a variable is another run, though it is not written down.
    other = load("mim", [*options, "data.train=https://host/${oc.env:EXPERIMENT}/{0..3}.tar"])
    saved = written(other)
    assert difference(other, resolved(saved)) is None
    monkeypatch.setenv("EXPERIMENT", "other-experiment")
    again = load("mim", [*options, "data.train=https://host/${oc.env:EXPERIMENT}/{0..3}.tar"])
    found = difference(again, resolved(saved))
    assert found is not None and found[0] == "digest"


def test_a_configuration_without_secrets_is_written_as_it_is() -> None:
    config = load("clip", ["model=tiny"])
    assert redacted(asdict(config)) == asdict(config)
    assert written(config) == {**asdict(config), "digest": digest(config)}


def test_shards_are_the_same_when_they_are_signed_again(tmp_path: Path) -> None:
    again = SIGNED.replace("0123abcd", "fedc/9876").replace("20261127", "20261128")
    assert shard_name(again) == shard_name(SIGNED) == "a.tar"
    assert shard_name(f"pipe:curl https://me:{PASSWORD}@host/x/b.tar") == "b.tar"


def test_a_source_has_no_secret_in_its_name() -> None:
    (source,) = list_sources(
        load("mim", ["data=shards", f"data.train=https://me:{PASSWORD}@host/a.tar?sig={PASSWORD}"]).data
    )
    assert PASSWORD not in source.name


def test_an_index_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2s.data.shards.sizes.known_sizes", lambda shards: dict.fromkeys(shards, 3))
    index_shards([SIGNED], tmp_path)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == {"https://host/a.tar?***": 3}
    assert read_index([SIGNED.replace("0123abcd", "9876")], tmp_path) == {SIGNED.replace("0123abcd", "9876"): 3}
