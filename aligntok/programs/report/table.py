"""The table of the runs, and what its columns mean."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import NamedTuple

from aligntok.programs.report.finding import DASH, frechet_name, percent
from aligntok.programs.report.runs import ENCODER, Run


class Column(NamedTuple):
    """A measure: its key, heading, how it is written, whether more is better, and what it means."""

    key: str
    heading: str
    write: Callable[[float], str]
    up: bool
    meaning: str


def columns(runs: list[Run]) -> list[Column]:
    """Return the measures of tokenizers: the usual ones, LPIPS where it was taken, and each Fréchet distance."""
    names = {name for run in runs for name in run.metrics}
    psnr = "pixel likeness of reconstruction and image, in dB, mean over the validation images; higher is better."
    ssim = "likeness of local structure, at most 1; higher is better."
    probe = (
        "share of validation images that a linear classifier names correctly from the latent, all cells side by side: "
    )
    result = [
        Column("val/psnr", "PSNR", "{:.2f}".format, True, psnr),
        Column("val/ssim", "SSIM", "{:.3f}".format, True, ssim),
    ]
    if "val/lpips" in names:
        result.append(Column("val/lpips", "LPIPS", "{:.3f}".format, False, "perceptual distance; lower is better."))
    if "val/codebook_usage" in names:
        used = "share of the codes that the validation images use; higher is better."
        evenly = "codes that would be as hard to guess if all were equally likely; higher is better."
        result.append(Column("val/codebook_usage", "Codes used", percent, True, used))
        result.append(Column("val/codebook_perplexity", "Code perplexity", "{:.0f}".format, True, evenly))
    for name in sorted(n for n in names if n.startswith(("val/rfd_", "val/rfid"))) or ["val/rfd_"]:
        heading = "rFD" if name == "val/rfd_" else frechet_name(name)
        meaning = "distance between image and reconstruction statistics in a network's features; lower is better."
        result.append(Column(name, heading, "{:.3g}".format, False, meaning))
    if "val/codebook_usage" in names and "val/probe" not in names:
        return result
    return [
        *result,
        Column("val/probe", "Probe", percent, True, probe + "what the latent knows of the content; higher is better."),
        Column(
            "val/probe_pooled",
            "Probe, pooled",
            percent,
            True,
            "the same from the mean of the latent's cells; higher is better.",
        ),
    ]


def table(runs: list[Run], dots: dict[str, str], shown: list[Column], what: str, say: Callable[[Run], str]) -> str:
    """Return a table as HTML.

    Args:
        runs: One row each.
        dots: The coloured mark of each run's name.
        shown: The measures.
        what: Heading of the second column.
        say: What stands there for a run, as HTML.
    """
    best = {column.key: best_value(column, runs) for column in shown}
    heads = ["Run", what, "Steps", "Time"] + [f"{c.heading} {'↑' if c.up else '↓'}" for c in shown]
    head = "".join(f'<th scope="col">{heading(text)}</th>' for text in [*heads, "Parameters"])
    body = "\n".join(f"<tr>{row(run, shown, best, dots[run.name], say(run))}</tr>" for run in runs)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def heading(text: str) -> str:
    """Return a column's heading; the feature of a Fréchet distance goes below it."""
    name, bracket, rest = text.partition(" (")
    if not bracket:
        return escape(text)
    feature, _, arrow = rest.rpartition(") ")
    return f"{escape(name)} {arrow}<small>{escape(feature)}</small>"


def row(run: Run, shown: list[Column], best: dict[str, str | None], dot: str, what: str) -> str:
    """Return the cells of a run."""
    origin = (
        f"<small>from {escape(run.parent.name if run.parent else str(run.init_from))}</small>" if run.init_from else ""
    )
    if run.tokenizer is not None:
        origin += f"<small>latents of {escape(run.tokenizer.name)}</small>"
    if run.stage == ENCODER and run.value("val/accuracy") is not None:
        origin += f"<small>accuracy {percent(run.value('val/accuracy'))}</small>"
    steps = f"{run.steps:,}" if run.steps or run.finished else DASH
    if not run.finished:
        planned = f"<small>of {run.planned_steps:,}</small>" if run.planned_steps else ""
        steps += f'{planned}<span class="unfinished">unfinished</span>'
    seconds = run.record.get("seconds") if run.finished else None
    cells = [what, steps, DASH if seconds is None else duration(seconds)]
    text = f'<th scope="row">{dot}{escape(run.name)}{origin}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)
    for column in shown:
        written = write(column, run)
        mark = ' class="best"' if written is not None and written == best[column.key] else ""
        text += f"<td{mark}>{measured(column, run, written)}</td>"
    return f'{text}<td class="parts">{parameters(run)}</td>'


def write(column: Column, run: Run) -> str | None:
    """Return a measure as text."""
    value = run.value(column.key)
    return None if value is None else column.write(value)


def measured(column: Column, run: Run, written: str | None) -> str:
    """Return a measure as HTML, with the step where that is not the last."""
    if written is None:
        return "not finite" if column.key in run.metrics else DASH
    step = run.measured_at(column.key)
    return written + (f"<small>at step {step:,}</small>" if step is not None and step != run.steps else "")


def best_value(column: Column, runs: list[Run]) -> str | None:
    """Return the best value as it is written; nothing where fewer than two runs compare."""
    compared = [run for run in runs if run.value(column.key) is not None]
    written = {column.write(run.value(column.key) or 0.0) for run in compared}
    if len(written) < 2 or len({run.measured_on() for run in compared}) > 1:
        return None
    choose = max if column.up else min
    return column.write(choose(run.value(column.key) or 0.0 for run in compared))


def parameters(run: Run) -> str:
    """Return how many parameters are trained and frozen, and whose they are."""
    lines = []
    for trained, word in ((True, "trained"), (False, "frozen")):
        parts = run.parts(trained)
        if parts:
            lines.append(f"{count(sum(parts.values()))} {word}<small>{escape(', '.join(parts))}</small>")
    return "".join(lines) or DASH


def count(number: int) -> str:
    """Return a number of parameters in three digits or so."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}" if number < 10 * size else f"{number / size:.1f} {unit}"
    return str(number)


def duration(seconds: float) -> str:
    """Return a time span for people."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def meanings(shown: list[Column], what: str, meaning: str) -> str:
    """Return a line on each column, ``what`` the second."""
    lines = [
        (what, meaning),
        ("Steps, Time", "optimizer steps of this run alone, and its training time, validation included."),
        *((column.heading, column.meaning) for column in shown),
        ("Parameters", "how many learn in this stage, how many stay as they are, and in which parts."),
    ]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text[:1].upper() + text[1:])}</dd>" for name, text in lines)
    return f"<dl>{items}</dl>"
