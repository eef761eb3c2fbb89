"""``aligntok report FOLDER``: one HTML page of what the runs in a folder show."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter
from PIL import Image

from aligntok.errors import UserError
from aligntok.files import write_text
from aligntok.programs.parser import Parser
from aligntok.programs.report.measures import Measure, best, columns, findings, write
from aligntok.programs.report.runs import Run, find_runs, read, setting, text

__all__ = ["report_command", "write_report"]
PACE = ("train/images_per_s", "train/data_wait", "train/grad_norm", "lr-")  # how training goes, not what it lowers
ERROR = "/mse_t"  # the error of a velocity per time bin: `val/mse_t0.3` is for t in [0.3, 0.4), drawn at 0.35
AGAIN = Path("again")  # the folder that the commands write to: the runs' own folders are taken
Panel = tuple[str, str]  # a caption, and the address of a figure
Line = tuple[str, Sequence[tuple[float, float]], str]  # colour, (x, value) along it, style as matplotlib names it
COLOURS = ("#7a7f87", "#2f6fd0", "#d98a00", "#0f8a63", "#b2408f", "#c8452f", "#5a4fc4", "#4c7f1c")
STYLE = {
    **{"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "aligntok"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a919c", "axes.labelcolor": "#1d2430"},
    **{"axes.grid": True, "grid.color": "#e4e5e2", "axes.axisbelow": True, "lines.linewidth": 1.6},
    **{"xtick.color": "#5d6675", "ytick.color": "#5d6675", "lines.markersize": 3.5},
}
SVG = {"format": "svg", "metadata": dict.fromkeys(("Creator", "Date", "Format", "Type"))}  # nothing that changes
LOG_FROM = 20.0  # ours: a curve that spans more than this factor gets a logarithmic axis
GAP = 2  # white pixels around each tile, as the grids are drawn
MAX_WIDTH, CRISP_WIDTH = 1600, 1100  # pixels of a picture: no more, and of a small one about so many


def report_command(arguments: list[str]) -> None:
    """Run ``aligntok report`` with the words that follow it."""
    about = "Write one self-contained HTML page with the numbers, pictures and curves of the runs in a folder."
    parser = Parser("report", about)
    parser.add_argument("folder", metavar="FOLDER", help="holds one folder per run, as `aligntok fit` wrote it")
    parser.add_argument("--output", metavar="FILE", help="the page (default: FOLDER/report.html)")
    print(write_report(**vars(parser.parse_args(arguments))))


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page and return its path.

    Args:
        folder: Holds the runs' folders, or is one.
        output: The page; by default ``report.html`` in the folder.

    Raises:
        UserError: There is no such folder, no run in it, a file of a run is broken, or the page cannot be written.
    """
    runs = find_runs(Path(folder))
    path = Path(folder) / "report.html" if output is None else Path(output)
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file in it, such as {path / 'report.html'}")
    write_text(path, page(Path(folder), runs))
    return path


def page(folder: Path, runs: list[Run]) -> str:
    """Return the page on some runs as HTML; it needs no other file and no network."""
    for i, run in enumerate(runs):
        run.colour = COLOURS[i % len(COLOURS)]
    kinds = {kind: [run for run in runs if run.kind == kind] for kind in ("tokenizer", "generator", "other")}
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals.update(columns=columns, best=best, write=write)
    return environment.get_template("page.html.j2").render(
        name=folder.resolve().name,
        runs=runs,
        kinds=kinds,
        findings=[sentence.replace(" %", "\N{NO-BREAK SPACE}%") for sentence in findings(runs)],
        detail_against_meaning=detail_against_meaning(runs),
        grids={run: rows for run in kinds["tokenizer"] if (rows := picture_rows(run.picture("step"), 3))},
        samples={run: named for run in kinds["generator"] if (named := sample_rows(run))},
        validation=over_training(kinds["tokenizer"]),
        generation=[*over_training(kinds["generator"]), *about_sampling(kinds["generator"])],
        losses={kind: panels for kind, own in kinds.items() if (panels := training(own, kind))},
        pace=[panel for own in kinds.values() for panel in training(own, "", pace=True)],
        commands=commands(folder, runs),
        now=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
    )


def over_training(runs: list[Run]) -> list[Panel]:
    """Return the measures over the steps, each run behind the one that it started from."""
    found = columns(runs, final=False).items()
    return [p for n, m in found for p in curves(m, [(r.colour, r.curve(n, chained=True), "o-") for r in runs], "steps")]


def about_sampling(runs: list[Run]) -> list[Panel]:
    """Return generators' error over time, accuracy along the sequence, and measures over the sampling steps."""
    errors: list[Line] = []
    for run, part, style in [(run, part, style) for run in runs for part, style in (("val", "o-"), ("train", "--"))]:
        ends = {name: run.curve(name)[-1:] for name in sorted(run.names) if name.startswith(part + ERROR)}
        points = [(float(name.partition(ERROR)[2]) + 0.05, end[0][1]) for name, end in ends.items() if end]
        errors.append((run.colour, points, style))
    panels = curves(Measure("Velocity error", "", False, ""), errors, "t: noise at 0, data at 1")
    along = [(run.colour, [(row["position"], row["accuracy"]) for row in run.per_position], "-") for run in runs]
    accuracy = Measure("Token accuracy along the sequence", "{:.1%}", True, "")
    panels += curves(accuracy, along, "position in the sequence: prefix, then the grid row by row")
    for name, measure in columns(runs).items():
        tried = [(run.colour, points, "o-") for run in runs if len(points := run.sweep(name)) > 1]
        panels += curves(measure, tried, "sampling steps", " over sampling steps")
    return panels


def training(runs: list[Run], kind: str, pace: bool = False) -> list[Panel]:
    """Return what was logged in training: the terms of the loss, or how it went."""
    prefixes = PACE if pace else ("train/", "val/") if kind == "other" else ("train/",)
    names = {name for run in runs for name in run.names if ERROR not in name and name.startswith(prefixes)}
    panels = []
    for name in sorted(name for name in names if name.startswith(PACE) == pace):
        measure = Measure(name, "{:.1%}" if name.endswith("/accuracy") else "", None, "")
        panels += curves(measure, [(run.colour, run.curve(name), "-") for run in runs], "steps")
    return panels


def sample_rows(run: Run) -> list[tuple[str, str]]:
    """Return the name of each class, or its number, and its last samples."""
    drawn, known = run.callback("SampleGrid").get("num_classes"), run.setting("network", "init_args", "num_classes")
    rows = picture_rows(run.picture("samples"), min(drawn, known) if type(drawn) is type(known) is int else 1)
    folder = Path(text(run.data("train", "init_args", "folder")) or "")
    places = (folder, run.folder.resolve().parent / folder.name)  # the runs' folder may have been moved
    listed = (setting(read(place / "manifest.json"), "images", "classes") for place in places)
    names = next((names for names in listed if isinstance(names, list)), [])
    labels = [str(name).partition(",")[0] for name in names]
    return [(labels[i] if i < len(labels) else str(i), row) for i, row in enumerate(rows)]


def curves(measure: Measure, lines: Sequence[Line], x: str, over: str = "") -> list[Panel]:
    """Return lines in one panel, nothing if none has points; ``over`` sampling steps, each doubling is as wide."""
    values = [value for _, points, _ in lines for _, value in points]
    with rc_context(STYLE):
        figure, axes = blank((4.0, 2.5), x, f"{measure.heading}, {measure.unit}".rstrip(", "), measure.form)
        for colour, points, style in lines:
            axes.plot([place for place, _ in points], [value for _, value in points], style, color=colour)
        if "%" not in measure.form and values and min(values) > 0 and max(values) > LOG_FROM * min(values):
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:,.6g}")
        axes.set_xlim(left=0)
        if over:
            axes.autoscale(axis="x")
            axes.set_xscale("log", base=2, subs=[])
            axes.xaxis.set_major_formatter("{x:,.6g}")
        return [(measure.title + over, address("svg+xml", figure.savefig, **SVG))] if values else []


def detail_against_meaning(runs: list[Run]) -> list[Panel]:
    """Return PSNR against the linear probe, arrows from a run to the one that started from it; nothing below two."""
    dots = {run: (psnr, probe) for run in runs if (psnr := run.value("val/psnr")) and (probe := run.value("val/probe"))}
    if len(dots) < 2 or len({run.measured_on() for run in dots}) > 1:
        return []
    with rc_context(STYLE):
        figure, axes = blank((4.6, 3.0), "PSNR, dB: more detail →", "linear probe: more meaning →", "%")
        axes.margins(0.2, 0.25)
        for i, (run, dot) in enumerate(sorted(dots.items(), key=lambda item: item[1])):
            axes.plot(*[[place] for place in dot], "o", color=run.colour, markersize=9)
            shift = (0, 9) if i % 2 == 0 else (0, -18)  # neighbours do not write over each other
            axes.annotate(run.name, dot, shift, textcoords="offset points", ha="center")
            if run.parent in dots:
                arrow = {"arrowstyle": "-|>", "color": "#8a919c"}
                axes.annotate("", xy=dot, xytext=dots[run.parent], arrowprops={**arrow, "shrinkA": 5, "shrinkB": 6})
        return [("Detail against meaning: up and right is better", address("svg+xml", figure.savefig, **SVG))]


def blank(size: tuple[float, float], x: str, y: str, form: str) -> tuple[Figure, Axes]:
    """Return an empty figure of a size in inches, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if "%" in form:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.tick_params(which="both", length=0)
    return figure, axes


def address(kind: str, save: Callable[..., object], **options: Any) -> str:
    """Return what ``save`` writes, a figure or a picture, as an address that holds it."""
    save(buffer := io.BytesIO(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_rows(path: Path | None, num_rows: int) -> list[str]:
    """Return the rows of a grid of tiles as addresses; none if it cannot be read or has not so many rows."""
    try:
        image = Image.open(path or "").convert("RGB")
    except OSError:  # missing, or no picture
        return []
    height, rest = divmod(image.height - GAP, num_rows)
    if rest or height <= GAP or image.width <= 2 * GAP:
        return []
    rows = []
    for top in range(GAP, num_rows * height, height):
        row = image.crop((GAP, top, image.width - GAP, top + height - GAP))
        row.thumbnail((MAX_WIDTH, MAX_WIDTH), Image.Resampling.LANCZOS)
        row = row.resize([side * max(1, CRISP_WIDTH // row.width) for side in row.size], Image.Resampling.NEAREST)
        rows.append(address("png", row.save, format="PNG", optimize=True))
    return rows


def commands(folder: Path, runs: list[Run]) -> list[str]:
    """Return what makes all of it again: each run, and what was encoded or sampled after the last run it needs."""
    found = [(verb, path) for verb in ("encode", "sample") for path in sorted(folder.glob(f"*/{verb}.yaml"))]
    written = [(verb, Run(path.parent, path.name)) for verb, path in found]
    made = [*(run for run in runs if run.config), *(other for _, other in written)]
    lines: dict[Run | None, list[str]] = {None: []}
    for run in runs:
        output, measured = AGAIN / run.name, run.within(run.validation.get("checkpoint")) or "checkpoints/last.ckpt"
        fit = repeat("fit", run, made, *(["--ckpt_path", "null"] if run.config.get("ckpt_path") else []))
        words = ["--config", output / "config.yaml", "--ckpt_path", output / measured, "--output", output]
        check = shlex.join(["aligntok", "validate", *map(str, words)])
        validated = run.validation.get("checkpoint") or run.kind == "generator"
        lines[run] = [fit, *([check] if validated else [])] if run.config else []
    for verb, other in written:
        used = [run for run in runs if any(run.within(path) for _, path in named_files(other.config))]
        lines[used[-1] if used else None].append(repeat(verb, other, made))
    return [line for own in lines.values() for line in own]


def repeat(verb: str, run: Run, made: list[Run], *more: str) -> str:
    """Return a command on a run's config that takes what is made again, as far as it fits together, from there."""
    places: dict[str, Path | None] = {}
    for key, path in named_files(run.config):
        inside = ((other, other.within(path)) for other in made if other is not run)
        places[key] = next((AGAIN / other.name / inner for other, inner in inside if inner), None)
    if any(key.startswith("data.") and place is None for key, place in places.items()):  # the old latents stay,
        places = {key: place for key, place in places.items() if not key.startswith(("model.", "data."))}  # all of it
    config = run.folder / f"{'config' if verb == 'fit' else verb}.yaml"
    words = [verb, "--config", str(config), "--output", str(AGAIN / run.name)]
    again = [word for key, place in places.items() if place for word in (f"--{key}", str(place))]
    return shlex.join(["aligntok", *words, *again, *more])


def named_files(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the option and the path of each checkpoint and each cache that a config names."""
    parts = config if prefix else ("init_from", "ckpt_path", "tokenizer", "model", "data")
    for key, value in ((key, config.get(key)) for key in parts):
        if isinstance(value, dict):
            yield from named_files(value, f"{prefix}{key}.")
        elif key in ("init_from", "ckpt_path", "path", "folder") and text(value):
            yield prefix + key, str(value)
