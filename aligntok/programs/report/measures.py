"""The measures that have a column, and what they say when runs are compared."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import NamedTuple

from aligntok.programs.report.runs import Run, setting

SAME_DB = 0.05  # ours: a PSNR difference below this is not worth a word
NEAR = 1.1  # ours: a Fréchet distance up to this factor above another is near it
TOLD = ("PSNR", "rF", "Linear probe", "Pooled probe", "Codes used")  # of two runs that are compared
FAR = "distance, in a network's features, between the statistics of "


class Measure(NamedTuple):
    """Heading, how a number is written, whether more is better (``None``: no run is the best), and what it means.

    >>> Measure("rFID", "{:.3g}", up=False, meaning="distance of reconstructions and images").title
    'rFID\N{NO-BREAK SPACE}↓'
    """

    heading: str
    form: str
    up: bool | None
    meaning: str
    unit: str = ""

    @property
    def title(self) -> str:
        """The heading with an arrow to where it is better."""
        return self.heading + {True: "\N{NO-BREAK SPACE}↑", False: "\N{NO-BREAK SPACE}↓", None: ""}[self.up]


TOKENIZER = {
    "val/psnr": Measure("PSNR", "{:.2f}", True, "pixel likeness of reconstruction and image, mean over images", "dB"),
    "val/ssim": Measure("SSIM", "{:.3f}", True, "likeness of local structure, at most 1"),
    "val/lpips": Measure("LPIPS", "{:.3f}", False, "perceptual distance of reconstruction and image"),
    "val/codebook_usage": Measure("Codes used", "{:.1%}", True, "share of the codes that validation images use"),
    "val/codebook_perplexity": Measure("Code perplexity", "{:.0f}", True, "equally likely codes as hard to guess"),
    "val/rfid": Measure("rFID", "{:.3g}", False, FAR + "reconstructions and images"),
    "val/rfd": Measure("rFD", "{:.3g}", False, FAR + "reconstructions and images"),
    "val/probe": Measure("Linear probe", "{:.1%}", True, "images whose class a linear classifier reads off the latent"),
    "val/probe_pooled": Measure("Pooled probe", "{:.1%}", True, "the same from the mean of the latent's cells"),
    "val/knn": Measure("Neighbours", "{:.1%}", True, "images whose class the 20 nearest training latents vote for"),
    "val/rankme": Measure("RankMe", "{:.1f}", None, "how many of its channels the latent uses"),
}
GENERATOR = {
    "val/gfid": Measure("gFID", "{:.3g}", False, FAR + "samples and reference images"),
    "val/gfd": Measure("gFD", "{:.3g}", False, FAR + "samples and reference images"),
    "val/sfid": Measure("sFID", "{:.3g}", False, "gFID in Inception's spatial features"),
    "val/is": Measure("IS", "{:.1f}", True, "Inception Score: clear and varied classes"),
    "val/class_agreement": Measure("Class agreement", "{:.1%}", True, "samples that a classifier names as asked"),
    "val/precision": Measure("Precision", "{:.1%}", True, "samples that lie among reference images"),
    "val/recall": Measure("Recall", "{:.1%}", True, "reference images that lie among samples: variety"),
    "val/kid": Measure("KID", "{:.3g}", False, "kernel distance, in a network's features, of samples and references"),
    "val/accuracy": Measure("Token accuracy", "{:.1%}", True, "validation tokens that are the first guess"),
    "val/loss": Measure("Validation loss", "{:.3f}", None, "what the stage minimises; compares within a stage"),
}


def write(value: float | None, form: str) -> str:
    """Return a number as text: by a format, as a ``time`` in seconds, or as a ``count`` in three digits."""
    if value is None or form == "time":
        return "not finite" if value is None else str(timedelta(seconds=round(value)))
    size, unit = next((pair for pair in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if value >= pair[0]), (1.0, ""))
    return f"{value / size:.3g}{unit}" if form == "count" else form.format(value).replace("%", " %")


def columns(runs: list[Run], final: bool = True) -> dict[str, Measure]:
    """Return the known measures that some run took, at its end or, if not ``final``, at any time."""
    taken = {name for run in runs for name in (run.metrics if final else run.names)}
    known = GENERATOR if any(run.kind == "generator" for run in runs) else TOKENIZER
    found = {}
    for key, measure in known.items():
        for name in sorted(n for n in taken if n == key or (n.startswith(f"{key}_") and n not in known)):
            if not re.search(r"_steps\d+$", name):
                found[name] = measure._replace(heading=measure.heading + f" ({name[len(key) + 1 :]})" * (name != key))
    return found


def best(runs: list[Run], name: str, measure: Measure) -> str | None:
    """Return the best value as it is written; nothing where fewer than two different ones compare."""
    values = {run: value for run in runs if (value := run.value(name)) is not None}
    if measure.up is None or len({run.measured_on() for run in values}) > 1:
        return None
    written = {write(value, measure.form) for value in values.values()}
    return write((max if measure.up else min)(values.values()), measure.form) if len(written) > 1 else None


def findings(runs: list[Run]) -> list[str]:
    """Return sentences that follow from the numbers; the first is the headline."""
    tokenizers = [run for run in runs if run.kind == "tokenizer" and run.value("val/psnr") is not None]
    said = [*about_tokenizers(tokenizers), *(s for run in tokenizers for s in about_chain(run, tokenizers))]
    said += about_generators([run for run in runs if run.kind == "generator"], runs)
    right = [(run.name, run.value("val/accuracy")) for run in runs if run.kind == "other"]
    said = said or [f"“{name}” names {share:.1%} of the validation images correctly." for name, share in right if share]
    return [sentence.replace("%", " %") for sentence in said] or ["No run has been measured yet."]


def about_tokenizers(runs: list[Run]) -> list[str]:
    """Return which tokenizer keeps most detail (PSNR) and which most meaning (linear probe)."""
    if len({run.measured_on() for run in runs}) > 1:
        return ["These runs were validated on different images: their numbers stand side by side but do not compare."]
    if not runs:
        return []
    first, top = (max(runs, key=lambda run: run.value(name) or 0.0) for name in ("val/psnr", "val/probe"))
    psnr, probe = f"{first.value('val/psnr'):.1f} dB", f"{top.value('val/probe') or 0:.1%}"
    said = f"Of {len(runs)} tokenizers, “{first.name}” reconstructs best ({psnr})"
    read = f"{'also' if top is first else f'“{top.name}”'} has the best linear probe ({probe})"
    if len(runs) == 1:
        said, read = f"“{first.name}” reconstructs at {psnr}", f"a linear probe on its latents is right on {probe}"
    return [f"{said}." if top.value("val/probe") is None else f"{said}, and {read}."]


def about_chain(run: Run, runs: list[Run]) -> list[str]:
    """Return a stage against the run that it started from, and against going on with that run's own stage instead."""
    start, moving = run.parent, {"encoder", "adapter", "quantizer"} & run.parts(trained=True).keys()
    if start is None or start not in runs or start.stage == run.stage:
        return []
    others = {start: "from which it started"}
    for control in (other for other in runs if other.parent is start and other.stage == start.stage):
        steps = "as many steps" if control.steps == run.steps else f"{control.steps:,} steps (against {run.steps:,})"
        others[control] = f"which trained “{start.name}” on for {steps}"
    said = []
    for other, what in others.items():
        told = {name: m for name, m in columns([run, other]).items() if m.heading.startswith(TOLD)}
        changes = [change(m, other.value(name), run.value(name)) for name, m in told.items()]
        if any(changes) and run.measured_on() == other.measured_on():
            held = "; its latents did not move" * (other is start and not moving and bool(run.parts(trained=False)))
            said.append(f"“{run.name}” against “{other.name}”, {what}: {', '.join(filter(None, changes))}{held}.")
    return said


def change(measure: Measure, before: float | None, after: float | None) -> str:
    """Return a difference in words, ``PSNR 1.30 dB better (25.00 → 26.30)``; nothing where one is missing."""
    if before is None or after is None:
        return ""
    old, new, gap = measure.form.format(before), measure.form.format(after), abs(after - before)
    if old == new or (measure.unit == "dB" and gap < SAME_DB):
        return f"{measure.heading} the same ({old} → {new})"
    size = f" {gap:.2f} dB" if measure.unit == "dB" else f" {100 * gap:.1f} points" if "%" in measure.form else ""
    return f"{measure.heading}{size} {'better' if (after > before) == measure.up else 'worse'} ({old} → {new})"


def about_generators(own: list[Run], runs: list[Run]) -> list[str]:
    """Return what a single generator draws, and at how many steps; of several, which has the lowest distance."""
    name, measure = next(iter(columns(own).items()), ("", None))
    measured = {run: value for run in own if (value := run.value(name)) is not None}
    if measure is None or not name.startswith("val/gf") or len({run.measured_on() for run in measured}) != 1:
        return []
    (first, lowest), *others = sorted(measured.items(), key=lambda item: item[1])
    origin = f"“{first.name}”" + (f" on the latents of “{first.tokenizer.name}”" if first.tokenizer else "")
    number = f"{measure.heading} {write(lowest, measure.form)}"
    if others:
        then = f"then “{others[0][0].name}” with {write(others[0][1], measure.form)}"
        return [f"Of {len(measured)} generators, {origin} has the lowest {number}, {then}."]
    said = [f"Samples of {origin}: {number}{f' at {n} sampling steps' if (n := first.sampling_steps) else ''}."]
    agreement = first.value("val/class_agreement")
    if agreement is not None:
        path = setting(first.callback("GenerationQuality"), "classifier", "init_args", "path")
        judge = next((run.value("val/accuracy") for run in runs if run.within(path)), None)
        known = f" that is right on {judge:.1%} of the validation images" if judge else " of real images"
        said.append(f"{agreement:.1%} of the samples are what was asked for, by a classifier{known}.")
    tried = {steps: write(value, measure.form) for steps, value in first.sweep(name)}
    if len(tried) > 1:
        most, lowest = min(first.sweep(name), key=lambda point: point[1])
        fewest = next(steps for steps, value in first.sweep(name) if value <= NEAR * lowest)
        close = f"; {fewest} steps come within {NEAR - 1:.0%} of it ({tried[fewest]})" if fewest < most else ""
        said.append(f"{measure.heading} is lowest at {most} sampling steps ({tried[most]}){close}.")
    return said
