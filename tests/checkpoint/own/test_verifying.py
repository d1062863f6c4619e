"""Damaged checkpoints: what is damaged is named, and a run continues from the newest whole one."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.saved import Written, meta, save
from w2s.checkpoint.own.checkpoint_folders import Saving, all_of, latest, point, read_meta
from w2s.checkpoint.own.manifest import Manifest, read_manifest
from w2s.checkpoint.own.verifying import damage, recover, verify
from w2s.config.sections import CheckpointConfig
from w2s.errors import CheckpointError
from w2s.files import Checksum
from w2s.megatron.parallel.process_groups import Ranks

FILE = "__0_1.distcp"


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def flip(path: Path) -> None:
    def change(content: bytearray) -> None:
        content[len(content) // 2] ^= 1

    edit(path, change)


def zero(path: Path) -> None:
    edit(path, lambda content: content.__setitem__(slice(500, 1000), bytes(500)))


def cut(path: Path) -> None:
    edit(path, lambda content: content.__delitem__(slice(min(1000, len(content) // 2), None)))


def older(path: Path) -> None:
    shutil.copy(path.parent.with_name("step-00000004") / path.name, path)


def of_another_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 6', '"step": 4'))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def renamed(path: Path, name: str) -> None:
    """A flipped bit in a name."""
    text = path.read_text()
    assert name in text
    path.write_text(text.replace(name, chr(ord(name[0]) ^ 1) + name[1:]))


def forget(path: Path) -> None:
    """The manifest and the meta.json of the layout before: no checkpoint of today becomes one of them."""
    (path / "manifest.json").unlink()
    flip(path / "meta.json")


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "data cut": (lambda path: cut(path / FILE), f"{FILE} has 1000 of 20000 bytes"),
    "data zeroed": (lambda path: zero(path / FILE), f"{FILE} has changed since it was written"),
    "data removed": (lambda path: (path / FILE).unlink(), f"{FILE} is missing"),
    "data a folder": (lambda path: make_folder(path / FILE), f"{FILE} is missing"),
    "a bit of data": (lambda path: flip(path / FILE), f"{FILE} has changed since it was written"),
    "data of an older one": (lambda path: older(path / FILE), f"{FILE} has changed since it was written"),
    "a bit of .metadata": (lambda path: flip(path / ".metadata"), ".metadata has changed since it was written"),
    "meta.json removed": (lambda path: (path / "meta.json").unlink(), "meta.json is missing"),
    "a bit of meta.json": (lambda path: flip(path / "meta.json"), "meta.json has changed since it was written"),
    "meta.json of an older one": (lambda path: older(path / "meta.json"), "meta.json is of step 4"),
    "meta.json no object": (lambda path: (path / "meta.json").write_text("[1]"), "meta.json has 3 of "),
    "another step in meta.json": (lambda path: of_another_step(path / "meta.json"), "meta.json is of step 4"),
    "manifest removed": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest cut": (lambda path: cut(path / "manifest.json"), "manifest.json cannot be read"),
    "manifest binary": (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
    "manifest a list": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "manifest of an older one": (lambda path: older(path / "manifest.json"), "manifest.json is of step 4"),
    "a name in the manifest": (
        lambda path: renamed(path / "manifest.json", FILE),
        "manifest.json has changed since it was written",
    ),
    "no step in the manifest": (
        lambda path: (path / "manifest.json").write_text('{"step": Infinity, "files": {}}'),
        "manifest.json has changed since it was written",
    ),
    "no size in the manifest": (
        lambda path: (path / "manifest.json").write_text('{"step": 6, "files": {"a": {"bytes": "x", "crc32": ""}}}'),
        "manifest.json has changed since it was written",
    ),
    "a deep manifest": (lambda path: (path / "manifest.json").write_text("[" * 10**5), "manifest.json cannot be read"),
    "a deep meta.json": (lambda path: (path / "meta.json").write_text('{"a":' * 10**5), "meta.json has 500000 of "),
    "both removed": (
        lambda path: [(path / name).unlink() for name in ("manifest.json", "meta.json")],
        "manifest.json is missing, meta.json cannot be read",
    ),
    "manifest removed, a bit of meta.json": (forget, "manifest.json is missing"),
    "a whole older one in its place": (
        lambda path: shutil.copytree(path.with_name("step-00000004"), path, dirs_exist_ok=True),
        "manifest.json is of step 4, meta.json is of step 4",
    ),
}


@pytest.fixture
def run(alone: Ranks, tmp_path: Path) -> Path:
    """A run with checkpoints at steps 2, 4 and 6."""
    for step in (2, 4, 6):
        save(tmp_path, meta(step), keep=3, ranks=alone)
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_from_the_newest_whole_one(
    kind: str, run: Path, alone: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    newest = latest(run)
    assert newest is not None
    break_it, line = KINDS[kind]
    break_it(newest)
    with pytest.raises(CheckpointError) as refused:
        verify(newest)
    assert line in str(refused.value), "what loads it without a run of its own stops"
    with pytest.raises(CheckpointError, match=r"step-00000006 is damaged: .*: leave out checkpoint\.strict=true"):
        recover(run, alone, strict=True)
    assert latest(run) == newest, "nothing is changed by a refusal"
    with caplog.at_level(logging.WARNING):
        recover(run, alone, strict=False)
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{newest} is damaged: ")
    assert line in message
    assert message.endswith("; resumes from step-00000004, 2 steps are repeated")
    assert "\n" not in message
    found = latest(run)
    assert found is not None
    assert read_meta(found) == meta(4)
    assert (run / "checkpoints" / "latest").read_text() == "step-00000004"
    assert names(run) == ["latest", "step-00000002", "step-00000004", "step-00000006.damaged"]
    # The run comes to step 6 again, and the damaged one is gone.
    save(run, meta(6), keep=3, ranks=alone)
    assert damage(newest) == []
    assert names(run) == ["latest", "step-00000002", "step-00000004", "step-00000006"]


def test_several_damaged_ones_are_passed_over(run: Path, alone: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    for path in all_of(run)[1:]:
        flip(path / FILE)
    with caplog.at_level(logging.WARNING):
        recover(run, alone, strict=False)
    endings = [record.getMessage().partition("; ")[2] for record in caplog.records]
    assert endings == [f"resumes from step-00000002, {steps} steps are repeated" for steps in (4, 2)]
    assert names(run) == ["latest", "step-00000002", "step-00000004.damaged", "step-00000006.damaged"]
    # One that was whole stays beside the next, whatever the damaged ones were called.
    save(run, meta(3), keep=2, ranks=alone)
    assert [path.name for path in all_of(run)] == ["step-00000002", "step-00000003"]


def test_a_run_without_a_whole_one_stops(run: Path, alone: Ranks) -> None:
    for path in all_of(run):
        flip(path / FILE)
    before = names(run)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole, step-00000006 is damaged: __0_1\.distcp"):
        recover(run, alone, strict=False)
    assert names(run) == before


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"step-00000099", b"../../elsewhere", b"step-00000006\nstep-00000002", b"a" * 5000, None],
)
@pytest.mark.parametrize("strict", [False, True])
def test_a_damaged_pointer_is_survived(
    content: bytes | None, strict: bool, run: Path, alone: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    pointer = run / "checkpoints" / "latest"
    if content is None:
        pointer.unlink()
    else:
        pointer.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        recover(run, alone, strict=strict)
    assert [record.getMessage() for record in caplog.records] == [
        f"{pointer} names no checkpoint: step-00000006 is the newest"
    ]
    assert pointer.read_text() == "step-00000006"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_pointer_that_is_no_file_is_replaced(make: Callable[[Path], None], run: Path, alone: Ranks) -> None:
    pointer = run / "checkpoints" / "latest"
    pointer.unlink()
    make(pointer)
    recover(run, alone, strict=False)
    assert pointer.is_file()
    assert pointer.read_text() == "step-00000006"


def test_a_user_may_point_to_an_older_one(run: Path, alone: Ranks) -> None:
    point(run, all_of(run)[0])
    recover(run, alone, strict=True)
    found = latest(run)
    assert found is not None
    assert read_meta(found).step == 2
    # Those of the future that the run has left are no reason to remove the past.
    save(run, meta(3), keep=2, ranks=alone)
    assert [path.name for path in all_of(run)] == [f"step-0000000{step}" for step in (2, 3, 4, 6)]


def test_a_new_run_has_nothing_to_recover(alone: Ranks, tmp_path: Path) -> None:
    recover(tmp_path, alone, strict=True)
    assert list(tmp_path.iterdir()) == []


def without_manifest(path: Path) -> None:
    """Make a checkpoint as earlier releases wrote it."""
    (path / "manifest.json").unlink()
    content = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**content, "format": 1}))


def test_a_checkpoint_of_an_earlier_release_is_loaded(
    run: Path, alone: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    for path in all_of(run):
        without_manifest(path)
    newest = all_of(run)[-1]
    with caplog.at_level(logging.WARNING):
        recover(run, alone, strict=True)
        verify(newest)
    line = f"{newest} cannot be verified: it was written without checksums"
    assert [record.getMessage() for record in caplog.records] == [line, line]
    of_another_step(newest / "meta.json")
    assert damage(newest) == ["meta.json is of step 4"]


def test_what_dead_writers_left_is_cleared(run: Path, alone: Ranks) -> None:
    folder = run / "checkpoints"
    half = folder / ".step-00000008.0123abcd.partial"
    half.mkdir()
    (half / FILE).write_bytes(b"half")
    shutil.copytree(folder / "step-00000002", folder / ".step-00000001.removed")
    recover(run, alone, strict=False)
    assert names(run) == ["latest", "step-00000002", "step-00000004", "step-00000006"]


def test_what_a_dead_writer_had_written_whole_is_kept(run: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    saving = Saving(run, meta(8), Written, CheckpointConfig(keep=3), alone)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            saving.finish()
    found = latest(run)
    assert found is not None
    assert found.name == "step-00000006"
    recover(run, alone, strict=True)
    found = latest(run)
    assert found is not None
    assert read_meta(found) == meta(8)


def test_an_unfinished_write_is_no_checkpoint(run: Path, alone: Ranks) -> None:
    Saving(run, meta(8), Written, CheckpointConfig(keep=3), alone)
    recover(run, alone, strict=True)
    assert names(run) == ["latest", "step-00000002", "step-00000004", "step-00000006"]


def test_the_manifest_names_every_file(run: Path) -> None:
    newest = all_of(run)[-1]
    found = read_manifest(newest)
    assert found.step == 6
    assert {*found.files, "manifest.json"} == {path.name for path in newest.iterdir()}
    # The check value of CRC-32 that its catalogues give.
    (newest / "check").write_bytes(b"123456789")
    checked = Manifest(6, {"check": Checksum(9, "cbf43926")})
    assert checked.damage(newest, ["check"], quick=False) == []


@pytest.mark.parametrize("readers", [1, 3, 7])
def test_each_file_is_read_by_one_rank_and_ranks_read_alike(readers: int) -> None:
    manifest = Manifest(
        1, {f"__{index}_0": Checksum(1000 + index, "0") for index in range(24)} | {"s": Checksum(1, "0")}
    )
    shares = [manifest.share(reader, readers) for reader in range(readers)]
    assert sorted(name for share in shares for name in share) == sorted(manifest.files)
    bytes_of = [sum(manifest.files[name].bytes for name in share) for share in shares]
    assert max(bytes_of) - min(bytes_of) <= 1023, "no more than a file"


def test_other_peoples_weights_have_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    verify(tmp_path)
    verify(tmp_path / "model.safetensors")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        verify(tmp_path)
