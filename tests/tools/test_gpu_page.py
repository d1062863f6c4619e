"""The page that tools/gpu_check.sh writes."""

import json
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from w2s.bench.report import Line, Report
from w2s.bench.speed import Speed

REPOSITORY = Path(__file__).parents[2]
PAGE = runpy.run_path(str(REPOSITORY / "tools" / "gpu_page.py"))


def speed(samples_per_second: float, towers_mfu: float, batch: int = 64) -> Speed:
    milliseconds, peak = 1e3 * batch / samples_per_second, 989
    parts = {"forward": milliseconds / 3, "backward": milliseconds / 3, "rest": milliseconds / 3}
    return Speed(milliseconds, samples_per_second, 500, 510, towers_mfu * peak, 0.505, 0.515, towers_mfu, 61.5, parts)


def report(stage: str, rows: list[Line], fp8: str = "none", peer: str | None = None) -> Report:
    return Report(
        stage, "eva_18b", {"vision": 4}, {"vision": 48}, "e+", 2264.0, "NVIDIA H100 80GB HBM3", 989.0, 1,
        {"compute": "bf16", "fp8": fp8}, {}, "synthetic", 8, peer, peer is not None, 1, {}, rows,
    )  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """BF16 with 64 and 128 images, FP8 1.5 times as fast in the towers with 128, and 1.25 times timm's speed."""
    bf16 = [Line(64, 64, speed(170, 0.5)), Line(128, 128, speed(200, 0.56, 128))]
    leave(tmp_path, "mim_bf16", report("mim", bf16))
    leave(tmp_path, "mim_tensorwise", report("mim", [Line(128, 128, speed(260, 0.84, 128))], fp8="tensorwise"))
    compared = Line(64, 64, speed(170, 0.5), speed(136, 0.4), 1.25, (1.25,))
    leave(tmp_path, "mim_timm", report("mim", [compared], peer="timm"))
    leave(tmp_path, "clip_bf16", report("clip", [Line(64, 64, None)]))
    leave(tmp_path, "clip_blockwise", None, 1, "a warning\nerror: precision.fp8=blockwise is not for this card\n")
    leave(tmp_path, "clip_open_clip", None, 124, "")
    leave(tmp_path, "tests", None, 1, "FAILED tests/x.py::test_y - AssertionError\n1 failed, 22 passed in 90.00s\n")
    (tmp_path / "machine.json").write_text(json.dumps({"card": "NVIDIA H100 80GB HBM3", "date": "2026-11-26"}))
    return tmp_path


def leave(folder: Path, name: str, found: Report | None, code: int = 0, log: str = "") -> None:
    (folder / f"{name}.json").write_text(json.dumps(asdict(found)) if found else "")
    (folder / f"{name}.log").write_text(log)
    (folder / f"{name}.rc").write_text(f"{code}\n")


def test_goals_and_whether_they_are_reached(results: Path) -> None:
    page = PAGE["page"](results)
    assert "- card: NVIDIA H100 80GB HBM3\n- date: 2026-11-26\n" in page
    assert "| student's stack in BF16, MFU, best batch | 0.55 | 0.56 | reached |" in page
    assert "| student's stack in FP8 over BF16, best recipe | 1.40 | 1.50 | reached |" in page
    assert "| mim: samples per second over timm's | 1.50 | 1.25 | missed |" in page
    assert "rehearsal" not in page.partition("```")[0].lower()


def test_every_batch_has_a_row_and_the_peer_its_own(results: Path) -> None:
    page = PAGE["page"](results)
    assert "| 128 | w2s, bf16 | 640.0 | 200.0 | 500.0 | 50.5% | 51.5% | 56.0% | 61.5 |  |" in page
    assert "| 128 | w2s, fp8 tensorwise | 492.3 | 260.0 |" in page
    assert "| 64 | timm, bf16, compiled | 470.6 | 136.0 |" in page
    assert "| 64 | w2s, bf16 | out of memory |" in page


def test_plans_stand_beside_what_was_measured(results: Path) -> None:
    planned = Line(64, 64, speed(170, 0.5), planned_milliseconds=320)
    leave(results, "mim_bf16", report("mim", [planned]))
    operations = [
        {"what": "QKV, forward", "shape": "[2056, 5120] x [5120, 15360]", "planned": 5e-4, "measured": 6e-4},
        {"what": "attention, flash_attention", "shape": "[8]", "planned": 1e-4, "measured": None},
    ]
    (results / "calibration.json").write_text(json.dumps({"card": "H100 SXM 80 GB", "rows": operations}))
    (results / "calibration.log").write_text("")
    (results / "calibration.rc").write_text("0\n")
    page = PAGE["page"](results)
    assert "| mim, bf16 | 64 | 320.0 | 376.5 | 1.18 |" in page
    assert "| QKV, forward | [2056, 5120] x [5120, 15360] | 500.0 | 600.0 | 1.20 |" in page
    assert "| attention, flash_attention | [8] | 100.0 | cannot be done here |  |" in page


def test_what_failed_is_told(results: Path) -> None:
    page = PAGE["page"](results)
    assert "| clip_blockwise | exit code 1: error: precision.fp8=blockwise is not for this card |" in page
    assert "| clip_open_clip | ran out of its time |" in page
    assert "| tests | 1 failed, 22 passed in 90.00s |\n|  | FAILED tests/x.py::test_y - AssertionError |" in page


def test_what_ran_out_of_time_is_told_from_what_was_killed(results: Path) -> None:
    leave(results, "tests", None, 124, "..F..\n")
    leave(results, "clip_bf16", None, 137, "error: rank 0 was killed by SIGKILL: see the system's log\n")
    leave(results, "clip_delayed", None, 124, "no time was left\n")
    page = PAGE["page"](results)
    assert "| tests | ran out of its time |" in page
    assert "| clip_bf16 | exit code 137: error: rank 0 was killed by SIGKILL: see the system's log |" in page
    assert "| clip_delayed | no time was left |" in page


def test_fp8_is_compared_with_the_same_batch_only() -> None:
    reports = {
        "plain": asdict(report("mim", [Line(64, 64, speed(100, 0.5))])),
        "other batch": asdict(report("mim", [Line(128, 128, speed(300, 0.9, 128))], fp8="delayed")),
    }
    assert PAGE["fp8_gain"]("mim", reports, "samples_per_second") is None
    reports["same batch"] = asdict(report("mim", [Line(64, 64, speed(120, 0.7))], fp8="delayed"))
    assert PAGE["fp8_gain"]("mim", reports, "samples_per_second") == pytest.approx(1.2)


def test_a_page_without_results_has_no_figures() -> None:
    page = PAGE["page"](None)
    assert "**Not yet run on a GPU**" in page
    assert "|" not in page
    kept = (REPOSITORY / "docs" / "h100.md").read_text(encoding="utf-8")
    assert ("**Not yet run on a GPU**" in kept) == ("- card: " not in kept)
    assert kept.endswith(PAGE["COMMAND"])


def test_a_rehearsal_says_so(results: Path) -> None:
    (results / "machine.json").write_text(json.dumps({"card": "none"}))
    assert PAGE["page"](results).startswith("**A rehearsal on a CPU with tiny sizes**")


def test_missing_packages_are_named() -> None:
    missing: Any = runpy.run_path(str(REPOSITORY / "tools" / "machine.py"))["missing"]
    assert missing(["torch>=2.6", "nowhere-1>=3", "torch>=99", "pandas; extra == 'demo'"]) == [
        "nowhere-1>=3 (not installed)",
        missing(["torch>=99"])[0],
    ]
    assert missing(["torch>=99"])[0].startswith("torch>=99 (2.")


@pytest.mark.slow
def test_a_rehearsal_on_a_cpu(tmp_path: Path) -> None:
    """All of it but the wheels, with tiny sizes: some three minutes on two cores."""
    command = ["bash", str(REPOSITORY / "tools" / "gpu_check.sh"), "--rehearse"]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OUT": str(tmp_path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    page = (tmp_path / "h100.md").read_text(encoding="utf-8")
    for name in ("calibration", "mim_bf16", "mim_timm", "clip_bf16", "clip_open_clip", "mim_emulated", "clip_emulated"):
        assert f"| {name} | done |" in page
