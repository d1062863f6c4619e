"""metrics.jsonl on a disk that fills up."""

import resource
from pathlib import Path

import pytest

from w2s.errors import UserError
from w2s.tracking.history import FILE_NAME, History, read_history


def test_lines_with_anything_but_numbers_are_left_out(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 1.5}',
        '{"step": 2, "loss": "y"}',
        '{"step": 3, "loss": 1' + "0" * 400 + "}",
        '{"step": 1' + "0" * 400 + "}",
        '{"step": true, "loss": 1}',
        '{"step": 4, "loss": null}',
        "garbage",
    ]
    (tmp_path / FILE_NAME).write_text("\n".join(lines))
    assert [record["step"] for record in read_history(tmp_path)] == [1, 4]


def test_lines_that_the_system_refuses_are_written_when_it_takes_them(tmp_path: Path) -> None:
    history = History(tmp_path, 0)
    history.append(1, 8, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # There is room for half a line more, as on a disk that becomes full.
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE_NAME).stat().st_size + 20, limits[1]))
    try:
        history.append(2, 16, {"loss": 2.0})
        history.append(3, 24, {"loss": float("inf")})
        assert [record["step"] for record in read_history(tmp_path)] == [1]
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl \(File too large\): free some space"):
            history.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    history.append(4, 32, {"loss": 4.0})
    assert [(record["step"], record["loss"]) for record in read_history(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, None),
        (4, 4),
    ]
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 4
