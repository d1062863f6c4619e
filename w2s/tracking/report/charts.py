"""Curves as SVG that takes on the colours of the page it is in."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

COLOURS = 7
"""The page has as many colours of curves, `--curve-0` and so on; an eighth curve has that of the first."""

_INK = "#010203"  # stands for the page's text colour in the finished SVG
_CURVES = [f"#0102{10 + number}" for number in range(COLOURS)]
_MOST_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """Values over steps or samples.

    Attributes:
        label: what it is, in the legend.
        steps: horizontal values.
        values: vertical values; None leaves a gap.
        colour: number of its colour.
        dotted: whether it is what others are compared with.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float | None]
    colour: int = 0
    dotted: bool = False

    @property
    def variable(self) -> str:
        """Its colour in the page's style."""
        return f"var(--curve-{self.colour % COLOURS})"


@dataclass(frozen=True)
class Chart:
    """Curves that belong together."""

    title: str
    curves: Sequence[Curve]
    over: str = "step"
    """What the horizontal axis is."""

    def svg(self, key: str) -> str:
        """The curves without title and legend, in CSS's `currentColor` and `var(--curve-N)`.

        Of many points only some are drawn.

        Args:
            key: what no other chart of the page has; keeps the ids inside the two elements apart.

        Returns:
            An `<svg>` element without a header, which refers to nothing outside itself.
        """
        figure = Figure(figsize=(3.9, 2.1))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.16, 0.18, 0.81, 0.78))
        for curve in self.curves:
            steps, heights = _thinned(curve)
            few = len(heights) < 15
            style = {"linestyle": (0, (1.5, 2.5))} if curve.dotted else {"marker": "o" if few else ""}
            axes.plot(steps, heights, color=_CURVES[curve.colour % COLOURS], linewidth=1.6, markersize=3, **style)
        axes.set_xlabel(self.over, fontsize=8, color=_INK, labelpad=1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
        axes.tick_params(colors=_INK, labelsize=8, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _as_element(figure, key)


def _thinned(curve: Curve) -> tuple[Sequence[float], NDArray[np.float64]]:
    stride = math.ceil(len(curve.steps) / _MOST_POINTS)
    heights = np.array([math.nan if value is None else value for value in curve.values], dtype=np.float64)
    return curve.steps[::stride], heights[::stride]


def _as_element(figure: Figure, key: str) -> str:
    text = io.StringIO()
    # Letters stay text, in the page's own font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    for number, colour in enumerate(_CURVES):
        svg = svg.replace(colour, f"var(--curve-{number})")
    return svg
