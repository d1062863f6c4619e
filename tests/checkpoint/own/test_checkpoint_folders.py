"""Checkpoints on disk: whole or not at all, the newest few kept."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.saved import Written, meta, save
from tests.distributed import run_ranks
from w2s.checkpoint.find import find, find_any, is_finished
from w2s.checkpoint.own.checkpoint_folders import Saving, kept_steps, latest, read_meta
from w2s.config.sections import CheckpointConfig, ParallelConfig
from w2s.errors import CheckpointError
from w2s.files import Checksum
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks


def finish(run: Path, stage: str = "mim") -> None:
    (run / "config.yaml").write_text("")
    (run / "result.json").write_text(json.dumps({"stage": stage}))


def test_the_newest_are_kept(alone: Ranks, tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, meta(step), keep=2, ranks=alone)
    found = latest(tmp_path)
    assert found is not None
    assert read_meta(found) == meta(10)
    assert sorted(path.name for path in found.parent.iterdir()) == ["latest", "step-00000002", "step-00000010"]


def test_chosen_steps_stay(alone: Ranks, tmp_path: Path) -> None:
    for step in (2, 4, 6, 7):
        save(tmp_path, meta(step), keep=1, ranks=alone, keep_at=[4, 9])
    names = {path.name for path in tmp_path.glob("checkpoints/step-*")}
    assert names == {"step-00000004", "step-00000007"}
    assert kept_steps(7, CheckpointConfig(every=2, keep=1, keep_at=[4, 9])) == {4, 7}
    assert kept_steps(8, CheckpointConfig(every=2, keep=3)) == {4, 6, 8}


def test_a_write_that_fails_leaves_the_one_before(alone: Ranks, tmp_path: Path) -> None:
    save(tmp_path, meta(1), keep=1, ranks=alone)

    class Failing(Written):
        def finish(self) -> dict[str, Checksum]:
            raise OSError("disk full")

    saving = Saving(tmp_path, meta(2), Failing, CheckpointConfig(keep=1), ranks=alone)
    with pytest.raises(OSError, match="disk full"):
        saving.finish()
    found = latest(tmp_path)
    assert found is not None
    assert read_meta(found).step == 1
    save(tmp_path, meta(3), keep=1, ranks=alone)
    assert not list(found.parent.glob("*.partial")), "what the failed write left is gone"


def refused_on(run: Path, call: str) -> tuple[str, list[str]]:
    """Save where the system refuses a call of the main rank; return the error and what is left."""
    with (
        process_groups.initialize_groups(ParallelConfig(), torch.device("cpu")) as ranks,
        pytest.MonkeyPatch.context() as patch,
    ):

        def refuse(*_: object) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        if ranks.main:
            patch.setattr(call, refuse)
        with pytest.raises(CheckpointError) as error:
            Saving(run, meta(1), Nothing, CheckpointConfig(), ranks).finish()
        return str(error.value), [path.name for path in (run / "checkpoints").iterdir()]


class Nothing(Written):
    """A rank that has nothing to write."""

    def __init__(self, folder: Path) -> None:
        self.files = []


@pytest.mark.parametrize("call", ["os.posix_fallocate", "w2s.checkpoint.own.checkpoint_folders.seal"])
def test_what_the_main_rank_is_refused_is_an_error_on_every_rank(tmp_path: Path, call: str) -> None:
    (error, left), (other, _) = run_ranks(refused_on, 2, tmp_path, call)
    assert error == other
    assert re.fullmatch(r"cannot write \S+\.partial \(Disk quota exceeded\): free some space or choose .*", error)
    assert left == []


def test_a_checkpoint_is_the_latest_only_when_it_is_finished(alone: Ranks, tmp_path: Path) -> None:
    first = save(tmp_path, meta(1), keep=2, ranks=alone)
    saving = Saving(tmp_path, meta(2), Written, CheckpointConfig(keep=2), ranks=alone)
    assert saving.written
    assert latest(tmp_path) == first
    assert saving.finish() == latest(tmp_path) != first


def test_a_run_without_checkpoint_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None


def test_a_damaged_checkpoint_is_named(alone: Ranks, tmp_path: Path) -> None:
    path = save(tmp_path, meta(1), keep=1, ranks=alone)
    sound = (path / "meta.json").read_text()
    (path / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match="step-00000001 is not a w2s checkpoint"):
        read_meta(path)
    (path / "meta.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="layout version 99"):
        read_meta(path)
    for version in (1, 2):
        (path / "meta.json").write_text(f'{{"format": {version}, "step": 1}}')
        with pytest.raises(CheckpointError, match=r"meta\.json is damaged \(stage, samples"):
            read_meta(path)
    (path / "meta.json").write_text(sound.replace('"samples": 8', '"samples": 9'))
    with pytest.raises(CheckpointError, match=r"step-00000001 is damaged: meta\.json has changed"):
        read_meta(path)
    (path / "meta.json").write_text("[]")
    with pytest.raises(CheckpointError, match="layout version None"):
        read_meta(path)


@pytest.mark.parametrize(
    "change",
    [{"step": "3"}, {"step": 2**70}, {"step": -1}, {"config": []}, {"parent": 3}, {"more": 1}, {"samples": None}],
    ids=str,
)
def test_a_meta_file_of_other_types_is_named(change: dict[str, Any], alone: Ranks, tmp_path: Path) -> None:
    path = save(tmp_path, meta(1), keep=1, ranks=alone) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged \(.*\): use another checkpoint"):
        read_meta(path.parent)
    for content in ("[]", "3", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"layout version None|is not a w2s checkpoint"):
            read_meta(path.parent)


def test_what_a_configuration_lacks_is_named(alone: Ranks, tmp_path: Path) -> None:
    found = read_meta(save(tmp_path, meta(1, config={"model": {"name": "tiny"}}), keep=1, ranks=alone))
    assert found.setting("model", "name") == "tiny"
    with pytest.raises(CheckpointError, match=r"has no teacher\.source in its meta\.json"):
        found.setting("teacher", "source")


def test_a_run_is_found_by_path_name_mlflow_id_and_age(alone: Ranks, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "group" / "second"
    for step, run in enumerate((first, second), start=1):
        save(run, meta(step), keep=1, ranks=alone)
        finish(run)
    os.utime(first / "result.json", (1, 1))

    def step_of(what: str) -> int:
        found = find(what, tmp_path, key="init.vision", stage="mim")
        assert found is not None
        return read_meta(found).step

    assert step_of(str(first)) == 1
    assert step_of(str(first / "checkpoints" / "step-00000001")) == 1
    assert step_of("first") == 1
    assert step_of("group/second") == 2
    assert step_of("id-2") == 2
    assert step_of("latest") == 2
    assert find("none", tmp_path, key="init.vision", stage="mim") is None


def test_what_cannot_be_found_is_one_line_with_the_key(alone: Ranks, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"init\.vision=latest: there is no finished mim run .*init\.vision=none"):
        find("latest", tmp_path, key="init.vision", stage="mim")
    with pytest.raises(CheckpointError, match=r"init\.vision=nowhere is neither a path"):
        find("nowhere", tmp_path, key="init.vision", stage="mim")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find("empty", tmp_path, key="init.vision", stage="mim")


@pytest.mark.parametrize("damage", [b"", b'{"stage": "m', b"[]", b'{"stage": 1}', b"[" * 100_000])
def test_a_run_with_a_damaged_result_is_not_finished(damage: bytes, alone: Ranks, tmp_path: Path) -> None:
    save(tmp_path, meta(1), keep=1, ranks=alone)
    finish(tmp_path)
    assert is_finished(tmp_path)
    (tmp_path / "result.json").write_bytes(damage)
    assert not is_finished(tmp_path)


def test_an_unfinished_run_is_not_the_latest(alone: Ranks, tmp_path: Path) -> None:
    save(tmp_path / "run", meta(1), keep=1, ranks=alone)
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="no finished mim run"):
        find("latest", tmp_path, key="init.vision", stage="mim")


def test_a_folder_without_a_checkpoint_is_told_what_it_is(tmp_path: Path) -> None:
    for name in ("group/mim/config.yaml", "group/eval/config.yaml", "young/config.yaml", "odd/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "young" / "checkpoints" / "step-000010").mkdir(parents=True)
    told = {
        "group": f"it holds the runs eval, mim: give {tmp_path / 'group' / 'eval'}",
        "young/checkpoints": f"it holds the checkpoints of a run: give {tmp_path / 'young'}",
        "odd": "it holds notes.txt: give a run, a checkpoint or a file",
        "bare": "it is empty: give",
    }
    for name, message in told.items():
        with pytest.raises(CheckpointError, match=r"no meta\.json, no checkpoints/step-… .*" + re.escape(message)):
            find_any(name, tmp_path, key="PATH")
    (tmp_path / "young" / "checkpoints" / "step-000010").rmdir()
    with pytest.raises(CheckpointError, match="it is a run that has saved none: give one that has"):
        find_any("young", tmp_path, key="PATH")
