"""The commands that do the same again."""

from __future__ import annotations

import shlex
from html import escape
from pathlib import Path

from aligntok.programs.report.predictions import Prediction
from aligntok.programs.report.runs import Run, setting, tokenizer_path, wrote

AGAIN = "again"  # the folder that the commands write to: the runs' own folders are taken
NUM_SAMPLES = "100"  # ours: for the eye, where nobody said how many


def commands(runs: list[Run], predictions: list[Prediction]) -> str:
    """Return training, measuring and writing in the order of the runs."""
    lines = [line for written in predictions if written.run is None for line in predict(written, runs, predictions)]
    for run in runs:
        own = [written for written in predictions if written.run is run]
        lines += [*fit(run, runs, predictions), *validate(run)]
        lines += [line for written in own for line in predict(written, runs, predictions)]
        lines += [] if own else draw(run)
    if not lines:
        return ""
    return (
        '<h2>Do it again</h2><p class="note">Each <code>config.yaml</code> is the whole run, layers and defaults'
        f" resolved. These commands write to <code>{AGAIN}/</code>; files that a config names, such as encoder weights,"
        f" are those of the original runs.</p><pre>{escape(chr(10).join(lines))}</pre>"
    )


def fit(run: Run, runs: list[Run], predictions: list[Prediction]) -> list[str]:
    """Return the lines that repeat one run; none where its config is lost."""
    if not repeatable(run):
        return []
    path = run.folder / "config.yaml"
    words = ["aligntok", "fit", "--config", str(path), "--output", f"{AGAIN}/{run.name}"]
    if run.parent is not None and run.init_from:
        words += ["--init_from", again(run.parent, run.init_from)]
    words += latents_again(run.config, runs, predictions)
    if run.config.get("ckpt_path"):
        words += ["--ckpt_path", "null"]  # the config is that of a resumed attempt
    earlier = len(list(run.folder.glob("config.*.yaml")))
    note = f"# {run.name} was trained in attempts with different configs; this is the last of {earlier + 1}"
    return [*([note] if earlier else []), shlex.join(words)]


def validate(run: Run) -> list[str]:
    """Return the line that measures again what was measured; a generator always, for the sweep is only done so."""
    measured = run.validation.get("checkpoint")
    if not repeatable(run) or not (measured or run.is_generator):
        return []
    output = f"{AGAIN}/{run.name}"
    checkpoint = again(run, measured) if measured and wrote(run, measured) else f"{output}/checkpoints/last.ckpt"
    words = ["--config", f"{output}/config.yaml", "--ckpt_path", checkpoint, "--output", output]
    return [shlex.join(["aligntok", "validate", *words])]


def predict(written: Prediction, runs: list[Run], predictions: list[Prediction]) -> list[str]:
    """Return the line that writes latents or samples again."""
    words = ["aligntok", "predict", "--config", str(written.folder / "predict.yaml")]
    words += ["--output", f"{AGAIN}/{written.name}"]
    if written.run is not None and written.checkpoint is not None:
        words += ["--ckpt_path", again(written.run, written.checkpoint)]
    return [shlex.join([*words, *latents_again(written.config, runs, predictions)])]


def draw(run: Run) -> list[str]:
    """Return the line that draws a few samples of a generator that wrote none."""
    num_classes = run.setting("network", "init_args", "num_classes")
    if not run.is_generator or num_classes is None or not repeatable(run):
        return []
    output = f"{AGAIN}/{run.name}"
    words = ["--config", f"{output}/config.yaml", "--config", "sample.yaml", "--output", f"{output}_samples"]
    words += ["--ckpt_path", f"{output}/checkpoints/last.ckpt", "--data.predict.init_args.num_samples", NUM_SAMPLES]
    return [shlex.join(["aligntok", "predict", *words, "--data.predict.init_args.num_classes", str(num_classes)])]


def latents_again(config: dict[str, object], runs: list[Run], predictions: list[Prediction]) -> list[str]:
    """Return what gives a generator the new tokenizer, and its latents: both or none, for they must fit each other."""
    path = tokenizer_path(config)
    tokenizer = next((run for run in runs if repeatable(run) and wrote(run, path)), None)
    words = ["--model.init_args.tokenizer.init_args.path", again(tokenizer, path)] if tokenizer and path else []
    for part in ("train", "val", "test"):
        source = setting(config, "data", part) or {}
        if str(source.get("class_path")).rpartition(".")[2] not in ("LatentShards", "TokenShards"):
            continue
        cache = next((p for p in predictions if p.is_at(setting(source, "init_args", "folder"))), None)
        if cache is None:
            return []
        words += [f"--data.{part}.init_args.folder", f"{AGAIN}/{cache.name}"]
    return words


def repeatable(run: Run) -> bool:
    """Tell whether the config is there."""
    return bool(run.config) and (run.folder / "config.yaml").is_file()


def again(run: Run, checkpoint: str) -> str:
    """Return where a run's checkpoint will lie when the run is repeated."""
    for folder in (run.folder, Path(run.config.get("output") or run.folder)):
        if Path(checkpoint).resolve().is_relative_to(folder.resolve()):
            return str(Path(AGAIN) / run.name / Path(checkpoint).resolve().relative_to(folder.resolve()))
    raise AssertionError(f"{checkpoint} is not of {run.name}")
