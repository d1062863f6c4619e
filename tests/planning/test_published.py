"""The planner beside published runs: within 25 % of those of wide models, within a third of the others."""

import json

import pytest
from typer.testing import CliRunner

from w2s.cli import app
from w2s.planning.published import Row, rows

WIDE = 4096


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return rows()


def test_wide_models_are_planned_within_a_quarter_and_others_within_a_half(found: list[Row]) -> None:
    assert len(found) == 15
    for row in found:
        low, high = (0.8, 1.25) if row.width >= WIDE else (0.67, 1.5)
        assert low < row.ratio < high, row


def test_rows_that_were_not_fitted_are_as_good_as_those_that_were(found: list[Row]) -> None:
    """Half of them are of each kind, with both cards and both kinds of models in either."""
    fitted, checked = ([row for row in found if row.fitted == kind] for kind in (True, False))
    assert abs(len(fitted) - len(checked)) <= 1
    for some in (fitted, checked):
        assert {row.unit for row in some} == {"mfu", "tokens", "samples"}
        assert {row.card.partition("-")[0] for row in some} == {"h100", "a100"}
        assert max(abs(row.ratio - 1) for row in some if row.width >= WIDE) < 0.15


def test_every_run_has_its_source(found: list[Row]) -> None:
    assert all(row.source and "same" not in row.source for row in found)


def test_the_command_prints_them() -> None:
    done = CliRunner().invoke(app, ["plan", "--published", "--json"])
    (first, *_) = json.loads(done.stdout)
    assert (first["name"], first["published"]) == ("GPT 1.7B", 41)
    assert first["ratio"] == first["planned"] / first["published"]


def test_names_are_not_broken_within_words_in_eighty_columns() -> None:
    done = CliRunner().invoke(app, ["plan", "--published"], env={"COLUMNS": "80"})
    assert all(word in done.stdout.split() for word in ("177B", "OpenCLIP", "g/14"))


@pytest.mark.parametrize("more", [["mim"], ["--gpus", "8"]])
def test_published_runs_take_no_stage_and_no_gpus(more: list[str]) -> None:
    done = CliRunner().invoke(app, ["plan", "--published", *more])
    assert done.exit_code == 2
    assert "its runs have their own, leave them out" in done.stderr
