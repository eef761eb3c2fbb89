"""The page: finding, table, pictures, curves, commands. It needs no other file and no network."""

from __future__ import annotations

import shlex
from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from aligntok.report.charts import NUM_COLOURS, Points, curves, trade_off
from aligntok.report.finding import frechet_name, headline, more_findings, tokenizers
from aligntok.report.pictures import data_uri, picture_rows
from aligntok.report.runs import Run
from aligntok.report.table import meanings, table

NO_LOSS = ("train/images_per_s", "train/data_wait", "train/grad_norm")  # how training goes, not what it lowers
SHARES = ("val/probe", "val/probe_pooled", "val/accuracy", "train/accuracy")
STYLE = Path(__file__).with_name("style.css")
AGAIN = "again"  # the folder that the commands write to: the runs' own folders are taken


def page(folder: Path, runs: list[Run]) -> str:
    """Return the page on some runs as HTML.

    Args:
        folder: Where they lie.
        runs: As ``find_runs`` gives them.
    """
    name = escape(folder.resolve().name)
    dots = {
        run.name: f'<span class="dot" style="--c: var(--run{i % NUM_COLOURS})"></span>' for i, run in enumerate(runs)
    }
    sections = [
        opening(name, runs),
        f"<h2>Runs</h2>{table(runs, dots)}{meanings(runs)}",
        pictures(runs, dots),
        measures(runs, dots),
        losses(runs, dots),
        commands(runs),
        footer(),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: aligntok report</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{STYLE.read_text()}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def opening(name: str, runs: list[Run]) -> str:
    """Return title, finding and the picture of the trade-off."""
    more = "".join(f"<li>{escape(sentence)}</li>" for sentence in more_findings(runs))
    unfinished = [escape(run.name) for run in runs if not run.finished]
    text = f"<h1>aligntok report: <b>{name}</b></h1><p class='finding'>{escape(headline(runs))}</p>"
    text += f'<ul class="more">{more}</ul>' if more else ""
    if unfinished:
        text += f'<p class="warning">Unfinished, still going or cut off: {", ".join(unfinished)}.</p>'
    if len(tokenizers(runs)) > 1:
        text += '<p class="note" style="margin-top: 1rem">Each row is one run: small differences may be chance.</p>'
    figure = trade_off_figure(runs)
    return f'<div class="hero"><div>{text}</div>{figure}</div>' if figure else text


def trade_off_figure(runs: list[Run]) -> str:
    """Return the picture of PSNR against the probe, where two runs have both."""
    shown = [(i, run) for i, run in enumerate(runs) if None not in (run.value("val/psnr"), run.value("val/probe"))]
    if len(shown) < 2 or len({run.validation_images() for _, run in shown}) > 1:
        return ""
    points = [(i, run.name, run.value("val/psnr") or 0.0, run.value("val/probe") or 0.0) for i, run in shown]
    place = {id(run): k for k, (_, run) in enumerate(shown)}
    arrows = [(place[id(run.parent)], place[id(run)]) for _, run in shown if run.parent and id(run.parent) in place]
    caption = "<figcaption>Detail against meaning: up and right is better</figcaption>"
    return f"<figure>{caption}{trade_off(points, arrows)}</figure>"


def pictures(runs: list[Run], dots: dict[str, str]) -> str:
    """Return originals, then every run's reconstructions below each other, then every run's latents."""
    rows = {run.name: rows for run in runs if (path := run.picture()) and (rows := picture_rows(path))}
    if not rows:
        return ""
    same = len({three[0] for three in rows.values()}) == 1
    steps = {run.name: int((run.picture() or Path("0")).stem.rpartition("_")[2]) for run in runs if run.name in rows}
    above = [strip("originals", "", next(iter(rows.values()))[0])] if same else []
    for name, three in rows.items():
        if not same:
            above.append(strip(f"{dots[name]}{escape(name)}", "originals", three[0]))
        above.append(strip(f"{dots[name]}{escape(name)}", f"reconstructions, step {steps[name]:,}", three[1]))
    below = [
        strip(f"{dots[name]}{escape(name)}", f"latents, step {steps[name]:,}", three[2]) for name, three in rows.items()
    ]
    return (
        '<h2>Pictures</h2><p class="note">Validation images through each run at its last picture: reconstructions of'
        " a good tokenizer cannot be told from the originals.</p>"
        f'<div class="strips">{"".join(above)}</div>'
        '<h3>What the latents look like</h3><p class="note">Each cell of a latent grid, its three main directions of'
        " variation as red, green and blue. Every run has its own directions: compare the patterns, not the hues.</p>"
        f'<div class="strips">{"".join(below)}</div>'
    )


def strip(name: str, what: str, image: bytes) -> str:
    """Return one row of images with its caption, which is HTML already."""
    caption = f"{name}<small>{what}</small>" if what else name
    return (
        f'<div class="strip"><div class="name">{caption}</div><img alt="{what or name}" src="{data_uri(image)}"></div>'
    )


def measures(runs: list[Run], dots: dict[str, str]) -> str:
    """Return what was measured on the validation images over the steps, each run behind its parent."""
    titles = {
        "val/psnr": "PSNR, dB ↑",
        "val/ssim": "SSIM ↑",
        "val/probe": "Linear probe ↑",
        "val/probe_pooled": "Probe, pooled ↑",
    }
    names = {name for run in tokenizers(runs) for row in run.rows for name in row}
    titles |= {name: f"{frechet_name(name)} ↓" for name in sorted(names) if name.startswith(("val/rfd_", "val/rfid"))}
    panels = [panel(runs, name, title, chained=True) for name, title in titles.items()]
    shown = [run for run in tokenizers(runs) if any(run.curve(name) for name in titles)]
    if not any(panels):
        return ""
    return (
        '<h2>Validation</h2><p class="note">Steps count on from run to run: a run begins where the one that it started'
        f' from ended.</p>{legend(shown, dots)}<div class="panels">{"".join(panels)}</div>'
    )


def losses(runs: list[Run], dots: dict[str, str]) -> str:
    """Return the training curves: every loss, and, folded, what else was logged."""
    groups = [tokenizers(runs), [run for run in runs if run not in tokenizers(runs)]]
    text, folded = "", ""
    for number, group in enumerate(groups):
        names = sorted(
            {name for run in group for row in run.rows for name in row if name.startswith(("train/", "lr-", "val/"))}
        )
        terms = [n for n in names if n.startswith("train/") and not n.startswith(NO_LOSS)]
        if number:
            terms += [n for n in names if n.startswith("val/")]
        rest = [n for n in names if n.startswith((*NO_LOSS, "lr-"))]
        if terms:
            shown = "".join(panel(group, n, n, colours=runs) for n in terms)
            note = "Training losses" if number == 0 else "Encoder"
            text += f'<h3>{note}</h3>{legend(group, dots)}<div class="panels">{shown}</div>'
        folded += "".join(panel(group, n, n, colours=runs) for n in rest)
    if not text:
        return ""
    text = (
        '<h2>Training</h2><p class="note">Each term before its weight, on training batches, steps of each run alone.'
        f" <code>train/loss</code> sums what a stage trains on, so it does not compare between stages.</p>{text}"
    )
    if folded:
        summary = "<summary>Gradient norms, learning rates, speed</summary>"
        text += f'<details>{summary}<div class="panels">{folded}</div></details>'
    return text


def panel(runs: list[Run], name: str, title: str, chained: bool = False, colours: list[Run] | None = None) -> str:
    """Return one measure's curves as a figure, nothing where no run has it.

    Args:
        runs: Whose curves.
        name: Column of ``metrics.csv``.
        title: Its caption.
        chained: Count on from the run before, and begin at its last point.
        colours: The list in which a run's place decides on its colour; ``runs`` by default.
    """
    lines: list[tuple[int, Points]] = []
    for run in runs:
        curve = [(step + run.offset, value) for step, value in run.curve(name)] if chained else run.curve(name)
        if curve and chained and run.parent and (before := run.parent.curve(name)):
            curve = [(before[-1][0] + run.parent.offset, before[-1][1]), *curve]
        if curve:
            lines.append(((colours or runs).index(run), curve))
    if not lines:
        return ""
    drawing = curves(lines, percent=name in SHARES, markers=chained, key=f"{name} {runs[0].name}")
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>"


def legend(runs: list[Run], dots: dict[str, str]) -> str:
    """Return which colour is whose."""
    entries = "".join(f"<span>{dots[run.name]}{escape(run.name)}</span>" for run in runs if run.rows)
    return f'<div class="legend">{entries}</div>'


def commands(runs: list[Run]) -> str:
    """Return the commands that train the same again."""
    lines = [line for run in runs for line in command(run)]
    if not lines:
        return ""
    return (
        '<h2>Do it again</h2><p class="note">Each <code>config.yaml</code> is the whole run, layers and defaults'
        f" resolved. These commands write to <code>{AGAIN}/</code>; files that a config names, such as encoder weights,"
        f" are those of the original runs.</p><pre>{escape(chr(10).join(lines))}</pre>"
    )


def command(run: Run) -> list[str]:
    """Return the lines that repeat one run; none where its config is lost."""
    path = run.folder / "config.yaml"
    if not run.config or not path.is_file():
        return []
    words = ["aligntok", "fit", "--config", str(path), "--output", f"{AGAIN}/{run.name}"]
    if run.parent is not None and run.init_from:
        words += ["--init_from", again(run.parent, run.init_from)]
    if run.config.get("ckpt_path"):
        words += ["--ckpt_path", "null"]  # the config is that of a resumed attempt
    earlier = len(list(run.folder.glob("config.*.yaml")))
    note = (
        [f"# {run.name} was trained in attempts with different configs; this is the last of {earlier + 1}"]
        if earlier
        else []
    )
    return [*note, shlex.join(words)]


def again(run: Run, checkpoint: str) -> str:
    """Return where a run's checkpoint will lie when the run is repeated."""
    for folder in (run.folder, Path(run.config.get("output") or run.folder)):
        if Path(checkpoint).resolve().is_relative_to(folder.resolve()):
            return str(Path(AGAIN) / run.name / Path(checkpoint).resolve().relative_to(folder.resolve()))
    raise AssertionError(f"{checkpoint} is not of {run.name}")


def footer() -> str:
    """Return when and by what the page was written."""
    now = datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    versions = ", ".join(f"{package} {installed(package)}" for package in ("aligntok", "torch", "lightning"))
    return f"<footer>Written {now} with {versions}.</footer>"


def installed(package: str) -> str:
    """Return a package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(version unknown)"
