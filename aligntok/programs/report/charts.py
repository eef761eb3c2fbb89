"""Curves as inline SVG whose colours follow the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter

TEXT, GRID, RUN = "#010203", "#040506", "#0a0b{:02x}"  # stand-ins that become CSS variables
NUM_COLOURS = 8
MAX_POINTS = 300  # per line: more than a panel has pixels to show
LOG_FROM = 20.0  # ours: a curve that spans more than this factor gets a logarithmic axis
NEAR_SHARES = 0.06  # below this span ticks stand less than 1 % apart
ROUND = [1, 2, 5, 10]  # ticks at 2.5 would be shown rounded
SIZE = (4.0, 2.35)  # inches, with room for three in a row

Points = Sequence[tuple[float, float]]


class Axis(NamedTuple):
    """What runs along the bottom; ``doubling`` gives each power of two the same room, else ``end`` may fix the end."""

    label: str
    doubling: bool = False
    end: float | None = None


class Line(NamedTuple):
    """The colour's number, (x, value) along the line, and whether it is dashed."""

    colour: int
    points: Points
    dashed: bool = False


STEPS, SAMPLING_STEPS = Axis("steps"), Axis("sampling steps", doubling=True)
TIME = Axis("t: noise at 0, data at 1", end=1.0)
POSITION = Axis("position in the sequence: prefix, then the grid row by row")


def curves(lines: Sequence[Line], axis: Axis, percent: bool = False, markers: bool = False, key: str = "") -> str:
    """Return a panel with one line or more per run.

    Args:
        lines: Each with a point at least.
        axis: What runs along the bottom.
        percent: The values are shares, to show in percent.
        markers: Mark each point.
        key: Differs from panel to panel of a page.
    """
    figure, axes = panel()
    values = [value for line in lines for _, value in line.points]
    for line in lines:
        places, heights = zip(*thinned(line.points), strict=True)
        colour = RUN.format(line.colour % NUM_COLOURS)
        marker = "o" if markers and not line.dashed else None
        style = "--" if line.dashed else "-"
        axes.plot(places, heights, style, color=colour, linewidth=1.6, marker=marker, markersize=3.5)
    if not percent and min(values) > 0 and max(values) / min(values) > LOG_FROM:
        axes.set_yscale("log")
    elif percent:
        axes.yaxis.set_major_formatter(percents(values))
    else:
        axes.yaxis.set_major_formatter(plain_numbers())
    along(axes, axis)
    return svg(figure, key)


def along(axes: Axes, axis: Axis) -> None:
    """Set scale, ticks and label of the bottom."""
    axes.set_xlabel(axis.label)
    if axis.doubling:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(2))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(plain_numbers())
        return
    if axis.end is not None:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(0, axis.end)


def trade_off(points: Sequence[tuple[int, str, float, float]], arrows: Sequence[tuple[int, int]], key: str = "") -> str:
    """Return PSNR against the probe, a dot per run, with arrows from a run to the one that started from it.

    Args:
        points: The colour's number, name, PSNR and probe of each run.
        arrows: Pairs of positions in ``points``.
        key: Differs from panel to panel of a page.
    """
    figure, axes = panel((4.6, 2.9))
    for start, end in arrows:
        style = {"arrowstyle": "-|>", "color": TEXT, "alpha": 0.45, "shrinkA": 5, "shrinkB": 6, "linewidth": 1.0}
        axes.annotate("", xy=points[end][2:], xytext=points[start][2:], arrowprops=style)
    for colour, _, psnr, probe in points:
        axes.plot([psnr], [probe], "o", color=RUN.format(colour % NUM_COLOURS), markersize=9)
    for (_, name, psnr, probe), (shift, align) in zip(points, label_places(points), strict=True):
        axes.annotate(name, (psnr, probe), (0, shift), textcoords="offset points", ha="center", va=align, color=TEXT)
    axes.margins(0.2, 0.28)
    axes.yaxis.set_major_formatter(percents([probe for _, _, _, probe in points]))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    axes.set_xlabel("PSNR, dB: more detail →")
    axes.set_ylabel("linear probe: more meaning →")
    return svg(figure, key)


def label_places(points: Sequence[tuple[int, str, float, float]]) -> list[tuple[int, str]]:
    """Return where each dot's name goes, above or below, so that near neighbours do not write over each other."""
    psnrs, probes = [point[2] for point in points], [point[3] for point in points]
    width, height = (max(psnrs) - min(psnrs)) or 1.0, (max(probes) - min(probes)) or 1.0
    places: list[tuple[int, str]] = []
    for i, (_, _, psnr, probe) in enumerate(points):
        near = [
            places[j][0]
            for j in range(i)
            if abs(points[j][2] - psnr) < 0.25 * width and abs(points[j][3] - probe) < 0.2 * height
        ]
        choices = [(9, "bottom"), (-9, "top"), (21, "bottom"), (-21, "top")]
        places.append(next((choice for choice in choices if choice[0] not in near), choices[0]))
    return places


def panel(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """Return an empty panel in the page's colours."""
    with rc_context({"font.size": 9, "axes.unicode_minus": True}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(TEXT)
        spine.set_alpha(0.5)
    axes.tick_params(which="both", length=0, labelcolor=TEXT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    return figure, axes


def percents(shares: Sequence[float]) -> PercentFormatter:
    """Return tick labels in percent, with a decimal where the shares lie near each other."""
    return PercentFormatter(1.0, decimals=0 if max(shares) - min(shares) > NEAR_SHARES else 1, symbol=" %")


def plain_numbers() -> ScalarFormatter:
    """Return tick labels without an offset in a corner."""
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_powerlimits((-4, 6))
    return formatter


def thinned(points: Points) -> list[tuple[float, float]]:
    """Return at most ``MAX_POINTS`` points, means of neighbours."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def svg(figure: Figure, key: str) -> str:
    """Return a figure as an ``<svg>`` element: text as text, no metadata, no address, colours from the page."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"aligntok {key}"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to these, and every figure has the same
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    text = text.replace(TEXT, "currentColor").replace(GRID, "var(--grid)")
    for colour in range(NUM_COLOURS):
        text = text.replace(RUN.format(colour), f"var(--run{colour})")
    return text.replace("<svg ", '<svg role="img" ', 1).strip()
