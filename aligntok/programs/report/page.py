"""The page: finding, tables, pictures, curves, commands. It needs no other file and no network."""

from __future__ import annotations

from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from aligntok.programs.report.charts import NUM_COLOURS, trade_off
from aligntok.programs.report.commands import commands
from aligntok.programs.report.finding import DASH, frechet_name, headline, more_findings, tokenizers
from aligntok.programs.report.generators import ERROR, generators
from aligntok.programs.report.panels import legend, panel
from aligntok.programs.report.pictures import data_uri, picture_rows
from aligntok.programs.report.predictions import find_predictions
from aligntok.programs.report.runs import ENCODER, Run
from aligntok.programs.report.table import columns, meanings, table

NO_LOSS = ("train/images_per_s", "train/data_wait", "train/grad_norm")  # how training goes, not what it lowers
STYLE = Path(__file__).with_name("style.css")


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
        tokenizer_table(runs, dots),
        pictures(runs, dots),
        measures(runs, dots),
        generators(runs, dots),
        losses(runs, dots),
        commands(runs, find_predictions(folder, runs)),
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
    more = "".join(f"<li>{unbroken(sentence)}</li>" for sentence in more_findings(runs))
    unfinished = [escape(run.name) for run in runs if not run.finished]
    text = f"<h1>aligntok report: <b>{name}</b></h1><p class='finding'>{unbroken(headline(runs))}</p>"
    text += f'<ul class="more">{more}</ul>' if more else ""
    if unfinished:
        text += f'<p class="warning">Unfinished, still going or cut off: {", ".join(unfinished)}.</p>'
    if len(tokenizers(runs)) > 1:
        text += '<p class="note" style="margin-top: 1rem">Each row is one run: small differences may be chance.</p>'
    figure = trade_off_figure(runs)
    return f'<div class="hero"><div>{text}</div>{figure}</div>' if figure else text


def unbroken(sentence: str) -> str:
    """Return a sentence as HTML, no line to begin with a percent sign."""
    return escape(sentence).replace(" %", "&nbsp;%")


def tokenizer_table(runs: list[Run], dots: dict[str, str]) -> str:
    """Return the table of the runs that are no generators, which have their own."""
    shown = [run for run in runs if not run.is_generator]
    if not shown:
        return ""
    what = "what was trained; “from” names the run whose weights it started with."
    text = table(shown, dots, columns(shown), "Stage", lambda run: escape(run.stage or DASH))
    return f"<h2>Runs</h2>{text}{meanings(columns(shown), 'Stage', what)}"


def trade_off_figure(runs: list[Run]) -> str:
    """Return the picture of PSNR against the probe, where two runs have both."""
    shown = [(i, run) for i, run in enumerate(runs) if None not in (run.value("val/psnr"), run.value("val/probe"))]
    if len(shown) < 2 or len({run.measured_on() for _, run in shown}) > 1:
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
    groups = {
        "Tokenizers": tokenizers(runs),
        "Encoder": [run for run in runs if run.stage == ENCODER],
        "Generators": [run for run in runs if run.is_generator],
    }
    text, folded = "", ""
    for title, group in groups.items():
        names = sorted(
            {name for run in group for row in run.rows for name in row if name.startswith(("train/", "lr-", "val/"))}
        )
        terms = [n for n in names if n.startswith("train/") and not n.startswith(NO_LOSS) and ERROR not in n]
        if title == "Encoder":
            terms += [n for n in names if n.startswith("val/")]
        elif title == "Generators":
            terms += [n for n in names if n in ("val/loss", "val/mse")]
        rest = [n for n in names if n.startswith((*NO_LOSS, "lr-"))]
        if terms:
            shown = "".join(panel(group, n, n, colours=runs) for n in terms)
            text += f'<h3>{title}</h3>{legend(group, dots)}<div class="panels">{shown}</div>'
        folded += "".join(panel(group, n, n, colours=runs) for n in rest)
    if not text:
        return ""
    text = (
        '<h2>Training losses</h2><p class="note">Each term before its weight, on training batches, steps of each'
        f" run alone. <code>train/loss</code> sums what a stage trains on, so it does not compare between stages."
        f"</p>{text}"
    )
    if folded:
        summary = "<summary>Gradient norms, learning rates, speed</summary>"
        text += f'<details>{summary}<div class="panels">{folded}</div></details>'
    return text


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
