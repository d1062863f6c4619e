"""Write docs/h100.md from the results of tools/gpu_check.sh.

    python tools/gpu_page.py [RESULTS] > docs/h100.md

RESULTS holds machine.json (of tools/machine.py) and, of each part, NAME.log, NAME.rc with its exit code, and NAME.json
with what `w2s bench step --json` or tools/calibrate.py printed. Without RESULTS the page says that nothing was run.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STACK_MFU, FP8_GAIN, PEER_RATIO = 0.55, 1.4, 1.5
"""The goals."""

HEAD = """# One H100

Speed of a training step at EVA-18B's width, on one card. The student has 4 of its 48 layers, and the teacher
(EVA02-CLIP-E+) or the text tower as large a part of theirs, so that their shares of the step are those of the whole
model. Data are noise in memory; each figure is the median of the measured steps. MFU is model FLOPs over the card's
dense BF16 peak, in FP8 too; "towers" are the forward and backward passes of what is trained, without the rest.
"""
GOALS = f"""The goals: {STACK_MFU:.0%} MFU in BF16 for the student's stack, FP8 at least {FP8_GAIN} x of BF16, and
{PEER_RATIO} x the samples per second of the compiled peer (timm for the masked stage, open_clip for the contrastive).
"""
PLANNER = """What `w2s plan` reckons with, beside what was measured: whole steps, and the products, sums of
gradients and attention that they are made of (`tools/calibrate.py`). Above 1 the plan was too hopeful.
"""
NOTHING = "**Not yet run on a GPU**: no figure stands here before one was measured.\n"
REHEARSAL = "**A rehearsal on a CPU with tiny sizes**: its figures say nothing about a card.\n"
COMMAND = """One command writes this page, in at most 10 minutes, on a machine with a Hopper GPU where w2s is installed,
or on a bare one with the wheels in `.te/` (no network is needed):

```bash
tools/gpu_check.sh             # what plans stand on, benchmarks, the tests with the marker `gpu`, this page
tools/gpu_check.sh --rehearse  # the same on a CPU with tiny sizes; the page goes beside the results
```
"""


@dataclass(frozen=True)
class Part:
    """What a part of the check left behind."""

    name: str
    code: int
    log: list[str]
    report: dict[str, Any] | None

    @property
    def ending(self) -> str:
        """How it ended, in a few words."""
        if self.code == 0:
            return "done"
        reason = self.log[-1] if self.log else "no word"
        if self.code == 124:
            return reason if reason == "no time was left" else "ran out of its time"
        return f"exit code {self.code}: {reason}"


def read_parts(results: Path) -> list[Part]:
    """The parts that were begun, in the order in which they ended."""
    paths = sorted(results.glob("*.rc"), key=lambda path: path.stat().st_mtime_ns)
    return [_read_part(path) for path in paths]


def _read_part(path: Path) -> Part:
    log = path.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
    printed = path.with_suffix(".json")
    code = int(path.read_text())
    # The tests print none.
    report = json.loads(printed.read_text(encoding="utf-8")) if code == 0 and printed.stat().st_size else None
    return Part(path.stem, code, [line for line in log if line.strip()], report)


def page(results: Path | None) -> str:
    """The whole page."""
    if results is None:
        return "\n".join([HEAD, NOTHING, GOALS, COMMAND])
    parts = read_parts(results)
    reports = {part.name: part.report for part in parts if part.report}
    calibration = reports.pop("calibration", None)
    machine = json.loads((results / "machine.json").read_text(encoding="utf-8"))
    lines = [f"{name}: {value}" for name, value in machine.items()]
    sections = [
        *([REHEARSAL] if machine["card"] == "none" else []),
        HEAD,
        "\n".join(f"- {line}" for line in lines) + "\n",
        "## Goals\n",
        GOALS,
        _goals(reports),
        "## Steps\n",
        *(_steps(stage, reports) for stage in ("mim", "clip")),
        "## The planner beside it\n",
        PLANNER,
        _planned_steps(reports),
        *([_planned_operations(calibration)] if calibration else []),
        "## What was run\n",
        _endings(parts),
        COMMAND,
    ]
    return "\n".join(sections)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def precision(report: dict[str, Any]) -> str:
    """What the linears computed in."""
    settings = report["precision"]
    fp8 = settings.get("fp8", "none")
    return settings["compute"] if fp8 == "none" else f"fp8 {fp8}"


def _of_stage(stage: str, reports: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Precision and row of every batch of ours that fitted, outside of the comparisons with a peer."""
    return [
        (precision(report), row)
        for report in reports.values()
        if report["stage"] == stage and not report["peer"]
        for row in report["rows"]
        if row["ours"]
    ]


def fp8_gain(stage: str, reports: dict[str, dict[str, Any]], whose: str) -> float | None:
    """The best ratio of an FP8 row to the BF16 row with the same batch, in one of the figures that grow with speed."""
    rows = _of_stage(stage, reports)
    plain = {row["micro_batch"]: row["ours"][whose] for kind, row in rows if kind == "bf16"}
    gains = [
        row["ours"][whose] / plain[row["micro_batch"]]
        for kind, row in rows
        if kind.startswith("fp8") and row["micro_batch"] in plain
    ]
    return max(gains, default=None)


def _goals(reports: dict[str, dict[str, Any]]) -> str:
    stacks = [row["ours"]["towers_mfu"] for kind, row in _of_stage("mim", reports) if kind == "bf16"]
    found: list[tuple[str, float, float | None]] = [
        ("student's stack in BF16, MFU, best batch", STACK_MFU, max(filter(None, stacks), default=None)),
        ("student's stack in FP8 over BF16, best recipe", FP8_GAIN, fp8_gain("mim", reports, "towers_tflops")),
    ]
    for report in reports.values():
        if report["peer"]:
            title = f"{report['stage']}: samples per second over {report['peer']}'s"
            found += [(title, PEER_RATIO, row["ratio"]) for row in report["rows"]]
    rows = [[name, f"{goal:.2f}", _number(value), _verdict(goal, value)] for name, goal, value in found]
    return table(["goal", "wanted", "measured", ""], rows)


def _verdict(goal: float, value: float | None) -> str:
    if value is None:
        return "not measured"
    return "reached" if value >= goal else "missed"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _steps(stage: str, reports: dict[str, dict[str, Any]]) -> str:
    columns = ["micro-batch", "", "ms", "samples/s", "TFLOP/s", "MFU", "HFU", "towers' MFU", "GiB", "ratio to the peer"]
    rows = []
    for report in (report for report in reports.values() if report["stage"] == stage):
        peer = f"{report['peer']}, {report['precision']['compute']}{', compiled' * report['peer_compiled']}"
        for row in report["rows"]:
            sides = [("ours", f"w2s, {precision(report)}", row["ratio"])]
            sides += [("peer", peer, None)] if report["peer"] else []
            rows += [_step(row["micro_batch"], title, row[side], ratio) for side, title, ratio in sides]
    title = {"mim": "Masked stage", "clip": "Contrastive stage, half of the patches"}[stage]
    return f"### {title}\n\n{table(columns, rows)}" if rows else f"### {title}\n\nNothing was measured.\n"


def _step(micro_batch: int, title: str, speed: dict[str, Any] | None, ratio: float | None) -> list[str]:
    if speed is None:
        return [str(micro_batch), title, "out of memory", *[""] * 7]
    fractions = ["" if speed[name] is None else f"{speed[name]:.1%}" for name in ("mfu", "hfu", "towers_mfu")]
    figures = [_number(speed[name], 1) for name in ("milliseconds", "samples_per_second", "model_tflops")]
    return [str(micro_batch), title, *figures, *fractions, _number(speed["memory_gib"], 1), _number(ratio)]


def _planned_steps(reports: dict[str, dict[str, Any]]) -> str:
    """Our steps beside what the planner says of the same layout."""
    rows = [
        [
            f"{report['stage']}, {precision(report)}",
            str(row["micro_batch"]),
            _number(planned, 1),
            _number(row["ours"]["milliseconds"], 1),
            _number(row["ours"]["milliseconds"] / planned),
        ]
        for report in reports.values()
        for row in report["rows"]
        if row["ours"] and (planned := row.get("planned_milliseconds"))
    ]
    columns = ["step", "micro-batch", "planned, ms", "measured, ms", "measured / planned"]
    return table(columns, rows) if rows else "No step was planned and measured.\n"


def _planned_operations(calibration: dict[str, Any]) -> str:
    """What a step is made of, beside what the planner says of it."""

    def row(each: dict[str, Any]) -> list[str]:
        planned, measured = 1e6 * each["planned"], each["measured"]
        if measured is None:
            return [each["what"], each["shape"], _number(planned, 1), "cannot be done here", ""]
        return [
            each["what"],
            each["shape"],
            _number(planned, 1),
            _number(1e6 * measured, 1),
            _number(1e6 * measured / planned),
        ]

    columns = ["operation", "shape", "planned, us", "measured, us", "measured / planned"]
    return table(columns, [row(each) for each in calibration["rows"]])


def _endings(parts: list[Part]) -> str:
    rows = []
    for part in parts:
        counted = part.name == "tests" and part.code in (0, 1) and part.log  # pytest's last line
        rows.append([part.name, part.log[-1] if counted else part.ending])
        rows += [["", line] for line in part.log if part.name == "tests" and line.startswith(("FAILED", "ERROR"))]
    return table(["part", "how it ended"], rows)


if __name__ == "__main__":
    print(page(Path(sys.argv[1]) if len(sys.argv) > 1 else None), end="")
