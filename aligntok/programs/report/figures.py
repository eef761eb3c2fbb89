"""Curves and pictures as addresses of images that hold their own data."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter, StrMethodFormatter
from PIL import Image, UnidentifiedImageError

from aligntok.programs.report.measures import Measure
from aligntok.programs.report.runs import Run

COLOURS = ("#7a7f87", "#2f6fd0", "#d98a00", "#0f8a63", "#b2408f", "#c8452f", "#5a4fc4", "#4c7f1c")
STYLE = {
    **{"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "aligntok"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a919c", "axes.labelcolor": "#1d2430"},
    **{"axes.grid": True, "grid.color": "#e4e5e2", "axes.axisbelow": True, "lines.linewidth": 1.6},
    **{"xtick.color": "#5d6675", "ytick.color": "#5d6675", "lines.markersize": 3.5},
}
LOG_FROM = 20.0  # ours: a curve that spans more than this factor gets a logarithmic axis
GAP = 2  # white pixels around each tile, as the grids are drawn
MAX_WIDTH, CRISP_WIDTH = 1600, 1100  # pixels of a picture: no more, and of a small one about so many


class Line(NamedTuple):
    """A curve: its colour, (x, value) along it, and whether it is dashed."""

    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


class Panel(NamedTuple):
    """A figure with its caption."""

    caption: str
    address: str


def curves(measure: Measure, lines: list[Line], x: str, markers: bool = False, over: str = "") -> list[Panel]:
    """Return lines in one panel, nothing if none has points; ``over`` sampling steps, each doubling is as wide."""
    lines = [line for line in lines if line.points]
    values = [value for line in lines for _, value in line.points]
    with rc_context(STYLE):
        figure, axes = blank((4.0, 2.5), x, measure.heading + (f", {measure.unit}" if measure.unit else ""))
        for line in lines:
            style = "--" if line.dashed else "o-" if markers else "-"
            axes.plot(*zip(*line.points, strict=True), style, color=line.colour)
        if "%" in measure.form:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        elif values and min(values) > 0 and max(values) > LOG_FROM * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=0)
        if over:
            axes.autoscale(axis="x")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        return [Panel(measure.title + over, svg(figure))] if lines else []


def detail_against_meaning(runs: list[Run]) -> list[Panel]:
    """Return PSNR against the linear probe, arrows from a run to the one that started from it; nothing below two."""
    dots = {run: (psnr, probe) for run in runs if (psnr := run.value("val/psnr")) and (probe := run.value("val/probe"))}
    if len(dots) < 2 or len({run.measured_on() for run in dots}) > 1:
        return []
    with rc_context(STYLE):
        figure, axes = blank((4.6, 3.0), "PSNR, dB: more detail →", "linear probe: more meaning →")
        axes.margins(0.2, 0.25)
        for i, (run, dot) in enumerate(sorted(dots.items(), key=lambda item: item[1])):
            axes.plot(*[[place] for place in dot], "o", color=run.colour, markersize=9)
            shift = (0, 9) if i % 2 == 0 else (0, -18)  # neighbours do not write over each other
            axes.annotate(run.name, dot, shift, textcoords="offset points", ha="center")
            if run.parent in dots:
                arrow = {"arrowstyle": "-|>", "color": "#8a919c", "shrinkA": 5, "shrinkB": 6}
                axes.annotate("", xy=dot, xytext=dots[run.parent], arrowprops=arrow)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        return [Panel("Detail against meaning: up and right is better", svg(figure))]


def blank(size: tuple[float, float], x: str, y: str) -> tuple[Figure, Axes]:
    """Return an empty figure of a size in inches, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.tick_params(which="both", length=0)
    return figure, axes


def svg(figure: Figure) -> str:
    """Return a figure as an address that holds it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_rows(path: Path | None, num_rows: int) -> list[str]:
    """Return the rows of a grid of tiles as addresses; none if it cannot be read or has not so many rows."""
    try:
        with Image.open(path or "") as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return []
    height, rest = divmod(image.height - GAP, num_rows)
    if rest or height <= GAP or image.width <= 2 * GAP:
        return []
    rows = []
    for top in range(GAP, num_rows * height, height):
        row, buffer = image.crop((GAP, top, image.width - GAP, top + height - GAP)), io.BytesIO()
        row.thumbnail((MAX_WIDTH, MAX_WIDTH), Image.Resampling.LANCZOS)
        row = row.resize([side * max(1, CRISP_WIDTH // row.width) for side in row.size], Image.Resampling.NEAREST)
        row.save(buffer, "PNG", optimize=True)
        rows.append(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return rows
