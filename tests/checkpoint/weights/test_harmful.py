"""Checkpoints whose files would run code: refused in one line, and nothing has run."""

import io
import pickle
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from tests.checkpoint.peers import released
from tests.checkpoint.saved import Harmful, seal_again
from w2s import cli
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.checkpoint.weights.tensor_files import open_weights
from w2s.config.load import load
from w2s.errors import CheckpointError
from w2s.megatron.checkpoint import state
from w2s.megatron.checkpoint.safe_unpickling import check_common, check_state, read_metadata


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What is there only if code has run."""
    return tmp_path / "mark"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("harmful"), load("clip", ["model=tiny"]).model
    torch.save(released(model), folder / "clip.pt")
    import_checkpoint(folder / "clip.pt", model, folder / "start")
    return folder / "start"


@pytest.fixture
def checkpoint(imported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(imported, tmp_path / "start")


def plant(checkpoint: Path, mark: Path, file: str) -> None:
    """Hide code in what a checkpoint says of its tensors, or in what Megatron keeps beside them."""
    if file == "common.pt":
        torch.save({"extra": Harmful(mark)}, checkpoint / file)
    else:
        found = read_metadata(checkpoint)
        found.planner_data = Harmful(mark)
        (checkpoint / file).write_bytes(pickle.dumps(found))
    seal_again(checkpoint)


def test_what_a_checkpoint_of_ours_says_is_read_as_torch_reads_it(checkpoint: Path) -> None:
    with (checkpoint / ".metadata").open("rb") as file:
        assert read_metadata(checkpoint) == pickle.load(file)
    assert FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "start"),
        ("export", "start", "--format", "safetensors", "--out", "out"),
        ("import", "start", "--model", "tiny", "--out", "out"),
        ("encode", "start", "--texts", "texts", "--out", "out", "hardware=cpu"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_commands_refuse_code_in_one_line(
    file: str,
    command: tuple[str, ...],
    checkpoint: Path,
    mark: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(checkpoint, mark, file)
    monkeypatch.chdir(checkpoint.parent)
    Path("texts").write_text("a text\n")
    monkeypatch.setattr(sys, "argv", ["w2s", *command])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: start/{file} names posix.mkdir, which is not part of a checkpoint")
    assert not mark.exists() and not Path("out").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        pickle.dumps([]),
        pickle.dumps(Metadata({"a": 3})),
        pickle.dumps(Metadata({}, storage_data=None)),
        b"\x80\x04" + b"(" * 10_000,
    ],
    ids=["empty", "cut", "a list", "a number", "no places", "deep"],
)
def test_damage_is_one_line(content: bytes, checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"start/\.metadata cannot be read \("):
        read_metadata(checkpoint)


def test_a_few_bytes_make_no_room_for_many_objects(checkpoint: Path) -> None:
    """An object is put at a place far away: an unpickler with a list of places would make room for all before it."""
    (checkpoint / ".metadata").write_bytes(b"\x80\x02Nr" + struct.pack("<I", 2**31) + b".")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"\.metadata cannot be read \(ValueError it is not a description"):
            read_metadata(checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name", ["common.pt", "weights.pt"])
def test_an_archive_that_unfolds_is_refused(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26 + 1))
    load = check_common if name == "common.pt" else open_weights
    with pytest.raises(CheckpointError, match=r"data\.pkl is compressed, and 64 MiB: use another file"):
        load(checkpoint if name == "common.pt" else path)


def test_tensors_lie_in_files_of_the_folder(checkpoint: Path) -> None:
    found = read_metadata(checkpoint)
    for index, place in found.storage_data.items():
        found.storage_data[index] = replace(place, relative_path="../../dev/zero")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match="it is not a description of tensors"):
        read_metadata(checkpoint)


def test_code_in_megatrons_common_file_is_refused(checkpoint: Path, mark: Path) -> None:
    check_common(checkpoint)
    torch.save({"extra": Harmful(mark)}, checkpoint / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt names posix\.mkdir, which is not part"):
        state._load({}, checkpoint)
    assert not mark.exists()


def test_code_in_an_object_is_refused(tmp_path: Path, mark: Path) -> None:
    """torch would load it with `weights_only=False`; so are scales of FP8 kept."""
    dcp.save({"scales": [1, 2], "harm": Harmful(mark)}, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    mark.rmdir() if mark.exists() else None
    sound = {"scales": None}
    dcp.load(sound, checkpoint_id=str(tmp_path / "a"), planner=DefaultLoadPlanner(), no_dist=True)
    assert sound == {"scales": [1, 2]}
    with pytest.raises(dcp.CheckpointException, match=r"harm of the checkpoint names posix\.mkdir"):
        dcp.load({"harm": None}, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    assert not mark.exists()


def test_code_in_the_scales_of_fp8_is_refused(mark: Path) -> None:
    """Transformer Engine unpickles them: bytes in a tensor, with tensors that are pickles in their turn."""

    def packed(content: object) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)

    class Nested:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes]]:
            output = io.BytesIO()
            torch.save(Harmful(mark), output)
            return torch.storage._load_from_bytes, (output.getvalue(),)

    check_state(packed({"scale_fwd": torch.ones(3), "recipe": None}), "x")
    check_state(torch.empty(0, dtype=torch.uint8), "x")
    check_state(None, "x")
    for content in (Harmful(mark), Nested()):
        with pytest.raises(CheckpointError, match=r"x names posix\.mkdir"):
            check_state(packed({"recipe": content}), "x")
    assert not mark.exists()


def test_code_in_other_peoples_weights_is_refused_by_its_name(tmp_path: Path, mark: Path) -> None:
    torch.save({"visual.cls_token": Harmful(mark)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read: it holds posix\.mkdir, which may run code"):
        open_weights(tmp_path / "a.pt")
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_torchscript_program_does_not_run(tmp_path: Path, mark: Path) -> None:
    """This one writes a file when `torch.jit.load` gives it its state."""

    class Program(torch.nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.path, self.weight = path, torch.nn.Parameter(torch.arange(6.0).view(2, 3))

        @torch.jit.export
        def __getstate__(self) -> tuple[str, torch.Tensor, bool]:
            return self.path, self.weight, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
            torch.save(state[1], state[0])
            self.path, self.weight, self.training = state[0], state[1], state[2]

    torch.jit.save(torch.jit.script(Program(str(mark))), tmp_path / "a.pt")
    torch.jit.load(tmp_path / "a.pt")
    assert mark.exists(), "torch runs it"
    mark.unlink()
    with pytest.raises(CheckpointError, match=r"a\.pt holds no tensors"):
        open_weights(tmp_path / "a.pt")
    assert not mark.exists()
