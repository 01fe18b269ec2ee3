"""Plots of a page, drawn by matplotlib as SVG that stands in the HTML and takes the page's colours, dark ones too.

Names stand in HTML beside a plot, not in it, so that long and hostile ones cannot spoil it. Needs the extra `report`.
"""

import hashlib
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sft.errors import ConfigError
from megatron_sft.pages.markup import COLOURS, Markup, join, swatch, tag

MOST_POINTS, LEAST_POINTS, POINTS = 240, 60, 960
"""Of a line at most and at least, of a figure. Of a longer line stand the means of so many parts; where lines are few also a
band from the least to the greatest value of each."""
MOST_MARKS = 40
"""Of a dashed line; one with more points has none."""
MOST = 1e30
"""Greater values are no measurement, and break the axes."""
LOGARITHMIC = 30.0
"""Values that span more than this factor can be shown on a logarithmic axis."""
_INK, _SOFT, _GRID = "#0a0b0c", "#0a0b0d", "#0a0b0e"
_COLOUR = "#0c0d{:02x}"
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-sft",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "grid.color": _GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
}


@dataclass(frozen=True)
class Series:
    """A line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: str = "line"
    """line, dashed (with points) or points."""


def require_matplotlib(what: str) -> None:
    """Raises ConfigError where it is missing, before there is anything to draw. `what`: "--html FILE", "report"."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError([f"{what} needs matplotlib for its plots, which is missing. Run: pip install 'megatron-sft[report]'"])


def chart(title: str, unit: str, series: Sequence[Series], is_logarithmic: bool = False, legend: bool | None = None) -> Markup:
    """Lines over iterations.

    Args:
        title: of the figure.
        unit: of the values.
        series: what is drawn; values that are no finite numbers are left out.
        is_logarithmic: where the values span more than LOGARITHMIC and all are above 0.
        legend: with names below the title; None: where there are several series.
    """

    def draw(axes: Any) -> None:
        for one in series:
            _line(axes, one, max(LEAST_POINTS, min(MOST_POINTS, POINTS // len(series))))
        values = np.concatenate([_points(one)[1] for one in series])
        if is_logarithmic and len(values) and values.min() > 0 and values.max() / values.min() > LOGARITHMIC:
            axes.set_yscale("log")
        _ticks(axes)
        axes.set_xlabel("iteration")

    has_legend = len(series) > 1 if legend is None else legend
    marks = [(swatch(one.colour, one.style), one.name) for one in series] if has_legend else []
    return _figure(title, unit, draw, marks)


def histogram(title: str, unit: str, edges: Sequence[float], counts: Sequence[float]) -> Markup:
    """Counts between edges, which may lie apart by a factor instead of a distance."""

    def draw(axes: Any) -> None:
        axes.stairs(counts, edges, fill=True, color=_colour(0))
        if edges[0] > 0 and edges[-1] / edges[0] > LOGARITHMIC:
            axes.set_xscale("log")
        _ticks(axes)
        axes.set_xlabel(unit)

    return _figure(title, "", draw)


def curve(title: str, x_label: str, unit: str, x: Sequence[float], y: Sequence[float]) -> Markup:
    """One filled line over something else than iterations, from 0 on."""

    def draw(axes: Any) -> None:
        axes.plot(x, y, color=_colour(0))
        axes.fill_between(x, y, color=_colour(0), alpha=0.25, linewidth=0)
        axes.set_ylim(bottom=0)
        _ticks(axes)
        axes.set_xlabel(x_label)

    return _figure(title, unit, draw)


def figures(parts: Sequence[Markup]) -> Markup:
    """Beside each other where there is room."""
    return tag("div", join(parts), 'class="figures"')


def _points(one: Series) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(one.x, float), np.asarray(one.y, float)
    shown = np.abs(y) < MOST
    return x[shown], y[shown]


def _line(axes: Any, one: Series, most: int) -> None:
    x, y = _points(one)
    colour = _colour(one.colour)
    if one.style == "points":
        axes.plot(x[-most:], y[-most:], "o", color=colour, markersize=5)
        return
    if len(x) > most:
        parts = np.array_split(y, most)
        x = np.array([part.mean() for part in np.array_split(x, most)])
        low, high = ([end(part) for part in parts] for end in (np.min, np.max))
        if most == MOST_POINTS:  # not where lines are many
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        y = np.array([part.mean() for part in parts])
    marker = "o" if len(x) == 1 or (one.style == "dashed" and len(x) <= MOST_MARKS) else ""
    axes.plot(x, y, color=colour, marker=marker, linestyle="--" if one.style == "dashed" else "-")


def _ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        is_logarithmic = axis.get_scale() == "log"
        low, high = axis.get_view_interval()
        whole = axis is axes.xaxis
        axis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=7)
            if is_logarithmic
            else MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10])
        )
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _, span=abs(high - low): _short(value, span)))


def _short(value: float, span: float) -> str:
    """1500 -> 1500, 25000 -> 25k, 4200000 -> 4.2M; as many digits as the axis needs."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            digits = 6 if span < abs(value) / 100 else 4
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{6 if 0 < span < abs(value) / 100 else 4}g}"


def _figure(title: str, unit: str, draw: Callable[[Any], None], marks: Sequence[tuple[Markup, str]] = ()) -> Markup:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        drawing = Figure(figsize=(4.5, 2.6), layout="constrained")
        draw(drawing.subplots())
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    caption = join([title, tag("span", f" {unit}") if unit else ""])
    legend = tag("ul", join(tag("li", join(mark)) for mark in marks), 'class="legend"') if marks else ""
    label = tag("figcaption", caption)
    return tag("figure", join([label, legend, _inline(buffer.getvalue())]))


def _colour(number: int) -> str:
    return _COLOUR.format(number % len(COLOURS))


def _inline(svg: str) -> Markup:
    """matplotlib's file as an element of a page: no namespaces, ids that no other plot has, colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r' id="[A-Za-z_.0-9]+_[0-9]+"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"<[^>]*>", lambda element: re.sub(r"(\d\.\d\d)\d+", r"\1", element[0]), svg)  # coordinates, not the text
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(id="|="#|url\(#)([mp][0-9a-f]{10})', rf"\g<1>\g<2>{own}", svg)
    for colour, name in ((_INK, "--ink"), (_SOFT, "--soft"), (_GRID, "--line")):
        svg = svg.replace(colour, f"var({name})")
    return Markup(re.sub(r"#0c0d([0-9a-f]{2})", lambda match: f"var(--c{int(match[1], 16)})", svg))
