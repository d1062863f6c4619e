"""The table of `w2s bench step`."""

from collections.abc import Callable

from rich.console import Console

from w2s.bench.marks import REST
from w2s.bench.parts import PARTS
from w2s.bench.report import Line, Report
from w2s.bench.speed import Speed
from w2s.tracking.tables import Cell, Table

Figure = Callable[[Speed], float | None]

_FIGURES: dict[str, Figure] = {
    "ms": lambda speed: speed.milliseconds,
    "samples/s": lambda speed: speed.samples_per_second,
    "model TFLOP/s": lambda speed: speed.model_tflops,
    "hardware TFLOP/s": lambda speed: speed.hardware_tflops,
    "MFU %": lambda speed: _percent(speed.mfu),
    "HFU %": lambda speed: _percent(speed.hfu),
    "towers' MFU %": lambda speed: _percent(speed.towers_mfu),
    "peak GiB": lambda speed: speed.memory_gib,
}


def print_report(report: Report) -> None:
    """Print a column for each batch of ours and of the peer's: the figures, and below them where the time goes."""
    console = Console(highlight=False)
    layers = ", ".join(f"{report.layers[name]} of {full} {name} layers" for name, full in report.full_layers.items())
    console.print(f"{report.model} {report.stage}: {layers}, {report.data} data, {report.ranks} x {report.device}")
    console.print(_table(report).to_rich())
    if report.bf16_peak_tflops is None:
        console.print(f"no MFU: no BF16 peak is known of {report.device}")


def _table(report: Report) -> Table:
    columns = [column for line in report.rows for column in _columns(report, line)]
    figures = _FIGURES | {f"ms: {name}": _of_part(name) for name in (*PARTS, REST)}
    rows: list[list[Cell]] = [
        [name, *(None if speed is None else figure(speed) for _, speed, _ in columns)]
        for name, figure in figures.items()
        if report.bf16_peak_tflops or "FU" not in name
    ]
    if report.peer:
        rows.insert(2, ["samples/s, ratio", *(ratio for _, _, ratio in columns)])
    return Table("", ["micro-batch", *(name for name, _, _ in columns)], rows)


def _columns(report: Report, line: Line) -> list[tuple[str, Speed | None, float | None]]:
    """Title, figures and ratio of ours, and of the peer's if there is one."""

    def column(whose: str, speed: Speed | None, ratio: float | None) -> tuple[str, Speed | None, float | None]:
        return f"{whose} {line.micro_batch}" + ("" if speed else ": out of memory"), speed, ratio

    ours = column("w2s", line.ours, line.ratio)
    return [ours, column(report.peer, line.peer, None)] if report.peer else [ours]


def _of_part(name: str) -> Figure:
    return lambda speed: speed.parts.get(name, 0.0)


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction
