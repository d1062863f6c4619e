"""Curves as SVG that takes on the colours of the page it is in."""

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_INK, _LINE = "#010203", "#010204"  # stand for the page's text and accent colour in the finished SVG
_MOST_POINTS = 600


def curve_svg(key: str, name: str, steps: Sequence[int], values: Sequence[float | None]) -> str:
    """One curve over the steps.

    Text and line are drawn in CSS's `currentColor` and `var(--accent)`. Of many points only some are drawn.

    Args:
        key: what no other chart of the page has; keeps the ids inside the two elements apart.
        name: title of the chart.
        steps: horizontal values.
        values: vertical values; None leaves a gap.

    Returns:
        An `<svg>` element without a header, which refers to nothing outside itself.
    """
    stride = math.ceil(len(steps) / _MOST_POINTS)
    heights = np.array([math.nan if value is None else value for value in values], dtype=float)[::stride]
    figure = Figure(figsize=(3.9, 2.3))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.17, 0.17, 0.8, 0.68))
    axes.plot(
        steps[::stride], heights, color=_LINE, linewidth=1.6, marker="o" if len(heights) < 15 else "", markersize=3
    )
    axes.set_title(name, fontsize=10, loc="left", color=_INK, weight="bold", parse_math=False)
    axes.set_xlabel("step", fontsize=8, color=_INK, labelpad=1)
    axes.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _as_element(figure, key)


def _as_element(figure: Figure, key: str) -> str:
    text = io.StringIO()
    # Letters stay text, in the page's own font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return svg.replace(_INK, "currentColor").replace(_LINE, "var(--accent)")
