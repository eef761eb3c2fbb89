"""Figures with the curves of several runs."""

from __future__ import annotations

from html import escape

from aligntok.programs.report.charts import STEPS, Axis, Line, curves
from aligntok.programs.report.runs import Run

SHARES = (
    "val/probe",
    "val/probe_pooled",
    "val/accuracy",
    "train/accuracy",
    "val/class_agreement",
    "val/precision",
    "val/recall",
)


def panel(runs: list[Run], name: str, title: str, chained: bool = False, colours: list[Run] | None = None) -> str:
    """Return one measure's curves over the steps as a figure, nothing where no run has it.

    Args:
        runs: Whose curves.
        name: Column of ``metrics.csv``.
        title: Its caption.
        chained: Validation: mark the points, count on from the run before, and begin at its last point.
        colours: The list in which a run's place decides on its colour; ``runs`` by default.
    """
    lines = []
    for run in runs:
        curve = [(step + run.offset, value) for step, value in run.curve(name)] if chained else run.curve(name)
        if curve and chained and run.parent and (before := run.parent.curve(name)):
            curve = [(before[-1][0] + run.parent.offset, before[-1][1]), *curve]
        lines.append(Line((colours or runs).index(run), curve))
    return figure(lines, title, STEPS, percent=name.startswith(SHARES), markers=chained, key=f"{name} {runs[0].name}")


def figure(
    lines: list[Line], title: str, axis: Axis, percent: bool = False, markers: bool = False, key: str = ""
) -> str:
    """Return lines that have points as a figure, nothing where none has; the arguments are those of ``curves``."""
    shown = [line for line in lines if line.points]
    if not shown:
        return ""
    drawing = curves(shown, axis, percent=percent, markers=markers, key=key)
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>"


def legend(runs: list[Run], dots: dict[str, str]) -> str:
    """Return which colour is whose."""
    entries = "".join(f"<span>{dots[run.name]}{escape(run.name)}</span>" for run in runs if run.rows)
    return f'<div class="legend">{entries}</div>'
