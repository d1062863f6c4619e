"""A training whose newest checkpoints are damaged, and the same command again."""

import logging
from pathlib import Path

import pytest

from tests.stages.conftest import Refused
from tests.stages.runs import QUIET, history, records, run_stage
from w2s.checkpoint.own.manifest import read_manifest


def test_a_run_that_falls_back_gives_the_numbers_of_one_that_was_not_damaged(
    refused: Refused, base: list[str], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit: metrics of every step, and the files of the last checkpoint with weights and moments."""
    options = [*base, *QUIET, "init.vision=none", "run.name=damaged", "train.steps=6"]
    options += ["checkpoint.every=2", "checkpoint.keep=3", "checkpoint.async_save=true"]
    run = run_stage("clip", options)
    folder = run / "checkpoints"
    names = ("step", "samples_seen", "loss", "grad_norm", "lr")
    before, last = {name: history(run, name) for name in names}, read_manifest(folder / "step-00000006").files
    tensors = folder / "step-00000006" / "__0_0.distcp"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 0x40
    tensors.write_bytes(content)
    (folder / "step-00000004" / ".metadata").write_bytes(b"")
    (folder / "latest").write_bytes(b"\xff")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], '{"step": 1, "lo', "[]", *lines[1:]]) + "\n\x00")
    (run / "result.json").unlink()

    error = refused("stage", "clip", *options, "checkpoint.strict=true")
    assert "step-00000006 is damaged: __0_0.distcp has changed since it was written" in error
    with caplog.at_level(logging.WARNING, "w2s"):
        run_stage("clip", options)
    messages = [record.getMessage() for record in caplog.records]
    assert any(message.endswith("resumes from step-00000002, 4 steps are repeated") for message in messages)
    assert {name: history(run, name) for name in names} == before
    assert [record["step"] for record in records(run)] == before["step"]
    again = read_manifest(folder / "step-00000006").files
    assert {name: again[name] for name in again if name.endswith(".distcp")} == {
        name: last[name] for name in last if name.endswith(".distcp")
    }
    assert not list(folder.glob("*.damaged"))
