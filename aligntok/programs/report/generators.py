"""The report's section on generators: table, samples by class, curves."""

from __future__ import annotations

from html import escape
from pathlib import Path

from aligntok.programs.report.charts import POSITION, SAMPLING_STEPS, TIME, Line
from aligntok.programs.report.finding import DASH, frechet_name, generation_distances, percent
from aligntok.programs.report.panels import figure, legend, panel
from aligntok.programs.report.pictures import data_uri, picture_rows
from aligntok.programs.report.runs import AUTOREGRESSION, Run, read_json, setting
from aligntok.programs.report.table import Column, meanings, table

ERROR = "/mse_t"  # LatentDiffusion's error per time bin: `val/mse_t0.3` is for t in [0.3, 0.4)
HALF_BIN = 0.05


def generators(runs: list[Run], dots: dict[str, str]) -> str:
    """Return the section, nothing where no run is a generator.

    Args:
        runs: All runs; a run's place decides on its colour.
        dots: The coloured mark of each run's name.
    """
    own = [run for run in runs if run.is_generator]
    if not own:
        return ""
    shown = generation_columns(own)
    what = (
        "from noise to latent, or token by token; guidance of scale 1 is none. “latents of” names the tokenizer's run."
    )
    text = f"<h2>Generators</h2>{table(own, dots, shown, 'Sampler', sampler)}{conditions(own)}"
    pictures = [samples(run, dots) for run in own if run.picture("samples")]
    explained = f"<div>{meanings(shown, 'Sampler', what)}</div>"
    text += f'<h3>Samples</h3><div class="samples">{"".join(pictures)}{explained}</div>' if pictures else explained
    return text + generation_curves(own, shown, dots, runs)


def generation_columns(own: list[Run]) -> list[Column]:
    """Return the measures that were taken; always a Fréchet distance and the class agreement."""
    far = "distance between statistics of samples and reference images in a network's features; lower is better."
    agree = "share of samples that a classifier of real images names as the class that was asked for."
    known = {
        "val/sfid": ("sFID", "{:.3g}".format, False, "gFID in Inception's spatial features; lower is better."),
        "val/is": ("IS", "{:.1f}".format, True, "Inception Score: clear and varied classes; higher is better."),
        "val/class_agreement": ("Class agreement", percent, True, agree),
        "val/precision": ("Precision", percent, True, "share of samples that lie among reference images."),
        "val/recall": ("Recall", percent, True, "share of reference images that lie among samples: variety."),
        "val/kid": ("KID", "{:.3g}".format, False, "kernel distance in a network's features; lower is better."),
    }
    if any(run.stage == AUTOREGRESSION for run in own):
        right = "share of the validation images' tokens that the network thinks most likely, given those before."
        surprise = "mean surprise at the next token of validation images, in nats; lower is better."
        known["val/accuracy"] = ("Token accuracy", percent, True, right)
        known["val/loss"] = ("Cross-entropy", "{:.3f}".format, False, surprise)
    distances = generation_distances(own) or ["val/gfd_"]
    names = {name for run in own for name in run.metrics if "_steps" not in name} | {"val/class_agreement"}
    result = [Column(n, frechet_name(n).replace(" ()", ""), "{:.3g}".format, False, far) for n in distances]
    for key, (heading, write, up, meaning) in known.items():
        for name in sorted(n for n in names if n == key or n.startswith(f"{key}_")):
            features = name.removeprefix(key).removeprefix("_")
            result.append(Column(name, heading + (f" ({features})" if features else ""), write, up, meaning))
    return result


def sampler(run: Run) -> str:
    """Return how it samples, as HTML."""
    name = str(run.setting("sampler", "class_path") or DASH).rpartition(".")[2]
    steps = f", {run.sampling_steps:,} steps" if run.sampling_steps else ""
    scale = run.setting("guidance", "init_args", "scale") or run.setting("sampler", "init_args", "guidance_scale")
    return escape(name + steps) + (f"<small>guidance {escape(str(scale))}</small>" if scale is not None else "")


def conditions(own: list[Run]) -> str:
    """Return on what ``aligntok validate`` measured, once for equal ones."""
    text = ""
    for line in dict.fromkeys(run.conditions for run in own if run.conditions):
        names = ", ".join(run.name for run in own if run.conditions == line)
        text += f'<p class="note">{escape(names)}, measured by <code>aligntok validate</code>: {escape(line)}.</p>'
    return text


def samples(run: Run, dots: dict[str, str]) -> str:
    """Return the last samples, a row for each class with its name."""
    path = run.picture("samples")
    assert path is not None
    drawn = run.callback("SampleGrid").get("num_classes")
    known = run.setting("network", "init_args", "num_classes")
    num_rows = min(drawn, known) if isinstance(drawn, int) and isinstance(known, int) else 1
    names = class_names(run) if num_rows > 1 else [""]
    rows = picture_rows(path, num_rows, enlarged=True) or []
    labels = [names[i] if i < len(names) else str(i) for i in range(len(rows))]
    cells = "".join(
        f'<span>{escape(name)}</span><img alt="samples {escape(name)}" src="{data_uri(row)}">'
        for name, row in zip(labels, rows, strict=True)
    )
    step = int(path.stem.rpartition("_")[2])
    caption = f"<figcaption>{dots[run.name]}{escape(run.name)} <small>after {step:,} steps</small></figcaption>"
    return f'<figure>{caption}<div class="classes">{cells}</div></figure>' if rows else ""


def class_names(run: Run) -> list[str]:
    """Return the names of the classes that the cache of the run's latents knows, shortened; empty where none is."""
    folder = setting(run.config, "data", "train", "init_args", "folder")
    if not isinstance(folder, str):
        return []
    places = [Path(folder), run.folder.resolve().parent / Path(folder).name]  # the runs' folder may have been moved
    manifest = next((place / "manifest.json" for place in places if (place / "manifest.json").is_file()), None)
    classes = setting(read_json(manifest), "images", "classes") if manifest else None
    return [str(name).partition(",")[0] for name in classes or []]


def generation_curves(own: list[Run], shown: list[Column], dots: dict[str, str], runs: list[Run]) -> str:
    """Return the measures over training and over the sampling steps, and the error over time."""
    main = [column for column in shown if column.key.startswith(("val/gf", "val/class_agreement"))]
    titled = [(column.key, f"{column.heading} {'↑' if column.up else '↓'}") for column in main]
    panels = [panel(own, key, f"{title} in training", chained=True, colours=runs) for key, title in titled]
    panels += [error_over_time(own, runs), accuracy_per_position(own, runs)]
    tried = [*titled, *((column.key, f"{column.heading} ↑") for column in shown if column.heading.startswith("Recall"))]
    panels += [over_sampling_steps(own, key, title, runs) for key, title in tried]
    if not any(panels):
        return ""
    note = (
        "<h3>Curves</h3><p class='note'>Of a diffusion generator, the error of the predicted velocity against time: 0"
        " is noise, 1 is data. Solid: validation, with averaged weights; dashed: training, the last steps. The curves"
        " over the number of sampling steps are of <code>aligntok validate</code>.</p>"
    )
    return f'{note}{legend(own, dots)}<div class="panels">{"".join(panels)}</div>'


def error_over_time(own: list[Run], runs: list[Run]) -> str:
    """Return the last error per time bin of each run."""
    lines = []
    for run in own:
        for part in ("val", "train"):
            names = sorted({name for row in run.rows for name in row if name.startswith(part + ERROR)})
            points = [(float(name.partition(ERROR)[2]) + HALF_BIN, run.curve(name)[-1][1]) for name in names]
            lines.append(Line(runs.index(run), points, dashed=part == "train"))
    return figure(lines, "Velocity error over time ↓", TIME, markers=True, key="error over time")


def accuracy_per_position(own: list[Run], runs: list[Run]) -> str:
    """Return how often the next token is foreseen, along the sequence."""
    lines = [Line(runs.index(run), [(row["position"], row["accuracy"]) for row in run.per_position]) for run in own]
    return figure(lines, "Token accuracy along the sequence ↑", POSITION, percent=True, key="accuracy per position")


def over_sampling_steps(own: list[Run], name: str, title: str, runs: list[Run]) -> str:
    """Return a measure against the number of sampling steps, of the runs that tried several."""
    lines = [Line(runs.index(run), points) for run in own if len(points := run.sweep(name)) > 1]
    shares = name.startswith(("val/class_agreement", "val/recall"))
    key = f"{name} over sampling steps"
    return figure(lines, f"{title} over sampling steps", SAMPLING_STEPS, percent=shares, markers=True, key=key)
