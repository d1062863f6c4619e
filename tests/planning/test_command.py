"""`w2s plan` on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from w2s import cli
from w2s.config.load import load
from w2s.errors import UserError
from w2s.planning.request import request


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["w2s", "plan", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


SMALL = ["model=eva_bigg", "teacher=eva02_clip_e_plus", "--card", "h100"]


def test_one_json_document_and_a_file_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "cluster.yaml"
    few = ["parallel.recompute=full", "parallel.pipeline=1"]
    assert run(monkeypatch, "mim", "clip", *SMALL, *few, "--gpus", "8", "--top", "2", "--json", "--out", str(out)) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (document["gpus"], document["card"]["name"], list(document["stages"])) == (
        8,
        "H100 SXM 80 GB",
        ["mim", "clip"],
    )
    for stage, found in document["stages"].items():
        best, second = found["layouts"]
        assert best["seconds_per_step"] <= second["seconds_per_step"]
        assert sum(best["seconds"].values()) == pytest.approx(best["seconds_per_step"])
        assert sum(best["gib"].values()) == pytest.approx(best["total_gib"])
        assert best["total_gib"] <= document["usable_gib"]
        assert best["gpu_hours"] == pytest.approx(8 * 24 * best["days"])
        config = load(stage, ["model=eva_bigg", f"hardware={out}"])
        assert config.hardware.name == "cluster"
        assert config.train.micro_batch == best["micro_batch"]
        assert (config.parallel.tensor, config.parallel.pipeline) == (best["tensor"], best["pipeline"])


def test_a_batch_is_made_legal_and_one_that_is_given_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ["parallel.tensor=1", "parallel.pipeline=1"]
    assert run(monkeypatch, "mim", *SMALL, *layout, "--gpus", "24", "--json") == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"].values()
    before = load("mim", SMALL[:2]).train
    assert stage["global_batch"] == round(before.global_batch / 24) * 24
    assert stage["steps"] * stage["global_batch"] >= before.steps * before.global_batch
    assert run(monkeypatch, "mim", *SMALL, *layout, "--gpus", "24", "--batch", "100") == 2
    assert "use train.global_batch=96" in capsys.readouterr().err


def test_a_command_in_a_file_can_be_pasted_into_a_shell() -> None:
    command = request(["mim", "model=eva_18b", "parallel.vision_split=[1,4]"], 8, "h100", ["96"]).command
    assert command == "w2s plan mim model=eva_18b 'parallel.vision_split=[1,4]' --gpus 8 --card h100 --batch mim=96"


def test_a_batch_is_that_of_every_stage_or_of_one() -> None:
    asked = request(["mim", "clip", "model=eva_18b"], 360, "h100", ["3600", "clip=108000"])
    train = {stage: asked.config(stage, 360).train for stage in asked.stages}
    assert [(part.global_batch, part.steps) for part in train.values()] == [(3600, 1_666_667), (108_000, 55_557)]
    for wrong in ("eval=3600", "clip=0", "many"):
        with pytest.raises(UserError, match=f"--batch {wrong} is not a batch of mim or clip: use 4096, or mim=4096"):
            request(["mim", "clip"], 8, "h100", [wrong])


def test_how_a_stage_scales(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["parallel.virtual_pipeline=1", "parallel.recompute=selective"]
    assert run(monkeypatch, "mim", *SMALL, *layout, "--gpus", "8", "--simulate", "64", "--json") == 0
    scaling = json.loads(capsys.readouterr().out)["scaling"]["mim"]
    assert [point["gpus"] for point in scaling["points"]] == [8, 16, 32, 64]
    efficiencies = [point["efficiency"] for point in scaling["points"]]
    assert efficiencies[0] == 1
    assert efficiencies[-1] < 1
    bent = [point["gpus"] for point in scaling["points"] if point["efficiency"] < 0.8]
    assert scaling["bend"] == (bent[0] if bent else None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--gpus", "8"], "stage eval is not one that is planned: use mim, clip, or both"),
        (["model=tiny", "--gpus", "8"], "w2s plan asks for no stage: use mim, clip, or both"),
        (["mim", "--gpus", "8", "--card", "h1000"], "--card h1000 is unknown: did you mean h100?"),
        (["mim", *SMALL, "--gpus", "8", "--out", "plan.txt"], "--out plan.txt must end in .yaml"),
        (["mim", *SMALL, "--gpus", "8", "--out", "nowhere/plan.yaml"], "there is no folder nowhere, make it first"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_tables_name_the_bottleneck(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["parallel.pipeline=1", "parallel.tensor=1"]
    assert run(monkeypatch, "clip", *SMALL[:1], *layout, "--gpus", "8", "--top", "1") == 0
    printed = capsys.readouterr().out
    assert "eva_bigg clip on 8 x H100 SXM 80 GB" in printed
    assert "bottleneck: matrix products of the towers" in printed
    assert "predicted, not measured" in printed
