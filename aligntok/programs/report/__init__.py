"""``aligntok report FOLDER``: one HTML page of what the runs in a folder show."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from aligntok.errors import UserError
from aligntok.files import write_text
from aligntok.programs.parser import Parser
from aligntok.programs.report.commands import commands
from aligntok.programs.report.figures import COLOURS, Line, Panel, curves, detail_against_meaning, picture_rows
from aligntok.programs.report.measures import Measure, best, columns, findings
from aligntok.programs.report.runs import Run, find_runs, read, setting, text

__all__ = ["report_command", "write_report"]
PACE = ("train/images_per_s", "train/data_wait", "train/grad_norm", "lr-")  # how training goes, not what it lowers
ERROR = "/mse_t"  # the error of a velocity per time bin: `val/mse_t0.3` is for t in [0.3, 0.4)
HALF_BIN = 0.05


def report_command(arguments: list[str]) -> None:
    """Run ``aligntok report`` with the words that follow it.

    Raises:
        UserError: There is no such folder, no run in it, or the page cannot be written.
    """
    about = "Write one self-contained HTML page with the numbers, pictures and curves of the runs in a folder."
    parser = Parser(prog="aligntok report", description=about, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", help="holds one folder per run, as `aligntok fit` wrote it")
    parser.add_argument("--output", metavar="FILE", help="the page (default: FOLDER/report.html)")
    options = parser.parse_args(arguments)
    print(write_report(options.folder, options.output))


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page and return its path.

    Args:
        folder: Holds the runs' folders, or is one.
        output: The page; by default ``report.html`` in the folder.

    Raises:
        UserError: There is no such folder, no run in it, or the page cannot be written.
    """
    folder = Path(folder)
    runs = find_runs(folder)
    path = Path(output) if output is not None else folder / "report.html"
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file in it, such as {path / 'report.html'}")
    write_text(path, page(folder, runs))
    return path


def page(folder: Path, runs: list[Run]) -> str:
    """Return the page on some runs as HTML; it needs no other file and no network."""
    for i, run in enumerate(runs):
        run.colour = COLOURS[i % len(COLOURS)]
    kinds = {kind: [run for run in runs if run.kind == kind] for kind in ("tokenizer", "generator", "other")}
    tokenizers, generators = kinds["tokenizer"], kinds["generator"]
    grids = {run: picture_rows(run.picture("step"), 3) for run in tokenizers}
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals.update(columns=columns, best=best, count=count, duration=duration)
    return environment.get_template("page.html.j2").render(
        name=folder.resolve().name,
        runs=runs,
        findings=findings(runs),
        unfinished=[run.name for run in runs if not run.finished],
        detail_against_meaning=detail_against_meaning(runs),
        others=[run for run in runs if run.kind != "generator"],
        tokenizers=tokenizers,
        generators=generators,
        grids={run: rows for run, rows in grids.items() if rows},
        samples={run: rows for run in generators if (rows := sample_rows(run))},
        validation=over_training(tokenizers),
        generation=[*over_training(generators), *about_sampling(generators)],
        losses={kind: panels for kind, own in kinds.items() if (panels := training(own, kind))},
        pace=[panel for own in kinds.values() for panel in training(own, "", pace=True)],
        kinds=kinds,
        commands=commands(folder, runs),
        written=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
    )


def over_training(runs: list[Run]) -> list[Panel]:
    """Return the measures over the steps, each run behind the one that it started from."""
    return [
        panel
        for name, measure in columns(runs, final=False).items()
        for panel in curves(measure, [Line(run.colour, run.curve(name, chained=True)) for run in runs], "steps", True)
    ]


def about_sampling(runs: list[Run]) -> list[Panel]:
    """Return generators' error over time, accuracy along the sequence, and measures over the sampling steps."""
    errors = []
    for run, part in ((run, part) for run in runs for part in ("val", "train")):
        ends = {name: run.curve(name)[-1:] for name in sorted(run.names) if name.startswith(part + ERROR)}
        points = [(float(name.partition(ERROR)[2]) + HALF_BIN, end[0][1]) for name, end in ends.items() if end]
        errors.append(Line(run.colour, points, dashed=part == "train"))
    panels = curves(Measure("Velocity error", "", False, ""), errors, "t: noise at 0, data at 1", True)
    along = [Line(run.colour, [(row["position"], row["accuracy"]) for row in run.per_position]) for run in runs]
    position = "position in the sequence: prefix, then the grid row by row"
    panels += curves(Measure("Token accuracy along the sequence", "{:.1%}", True, ""), along, position)
    for name, measure in columns(runs).items():
        tried = [Line(run.colour, points) for run in runs if len(points := run.sweep(name)) > 1]
        panels += curves(measure, tried, "sampling steps", True, over=" over sampling steps")
    return panels


def training(runs: list[Run], kind: str, pace: bool = False) -> list[Panel]:
    """Return what was logged in training: the terms of the loss, or how it went."""
    prefixes = PACE if pace else ("train/", "val/") if kind == "other" else ("train/",)
    panels = []
    for name in sorted({name for run in runs for name in run.names if ERROR not in name and name.startswith(prefixes)}):
        measure = Measure(name, "{:.1%}" if name.endswith("/accuracy") else "", None, "")
        lines = [Line(run.colour, run.curve(name)) for run in runs]
        panels += curves(measure, lines, "steps") if name.startswith(PACE) == pace else []
    return panels


def sample_rows(run: Run) -> list[tuple[str, str]]:
    """Return the name of each class, or its number, and its last samples."""
    drawn, known = run.callback("SampleGrid").get("num_classes"), run.setting("network", "init_args", "num_classes")
    num_rows = min(drawn, known) if isinstance(drawn, int) and isinstance(known, int) else 1
    folder = Path(text(run.data("train", "init_args", "folder")) or "")
    places = [folder, run.folder.resolve().parent / folder.name]  # the runs' folder may have been moved
    manifest = next((p / "manifest.json" for p in places if (p / "manifest.json").is_file()), None)
    listed = setting(read(manifest), "images", "classes") if manifest else None
    names = [str(name).partition(",")[0] for name in listed] if isinstance(listed, list) else []
    rows = picture_rows(run.picture("samples"), num_rows)
    return [(names[i] if i < len(names) else str(i), row) for i, row in enumerate(rows)]


def count(number: int) -> str:
    """Return a number of parameters in three digits."""
    size, unit = next((pair for pair in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if number >= pair[0]), (1.0, ""))
    return f"{number / size:.3g}{unit}"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
