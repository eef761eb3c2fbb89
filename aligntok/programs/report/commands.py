"""The commands that do the same again."""

from __future__ import annotations

import shlex
from pathlib import Path

from aligntok.programs.report.runs import Run, read, setting, text

AGAIN = Path("again")  # the folder that the commands write to: the runs' own folders are taken
VERBS = ("predict", "encode", "sample")  # what these wrote holds `<verb>.yaml`
CACHES = ("LatentShards", "TokenShards")


def commands(folder: Path, runs: list[Run]) -> list[str]:
    """Return training, measuring and writing in the order of the runs."""
    found = [(verb, path) for verb in VERBS for path in sorted(folder.glob(f"*/{verb}.yaml"))]
    written = [(verb, Run(path.parent, config=read(path))) for verb, path in found]
    maker = {other: next((run for run in runs if run.within(checkpoint(other))), None) for _, other in written}
    lines = [write(verb, other, None, runs, list(maker)) for verb, other in written if maker[other] is None]
    for run in runs:
        own = [write(verb, other, run, runs, list(maker)) for verb, other in written if maker[other] is run]
        lines += [*train(run, runs, list(maker)), *own]
    return lines


def train(run: Run, runs: list[Run], caches: list[Run]) -> list[str]:
    """Return the lines that repeat a run and what ``validate`` measured; none where its config is lost."""
    output, measured = AGAIN / run.name, text(run.validation.get("checkpoint"))
    start: list[str | Path] = ["--init_from", again(run.parent, run.init_from)] if run.parent else []
    resumed = ["--ckpt_path", "null"] if run.config.get("ckpt_path") else []  # the config of a resumed attempt
    words = [*start, *latents_again(run, runs, caches), *resumed]
    path = again(run, measured) if run.within(measured) else output / "checkpoints" / "last.ckpt"
    fit = line("fit", "--config", run.folder / "config.yaml", "--output", output, *words)
    check = line("validate", "--config", output / "config.yaml", "--ckpt_path", path, "--output", output)
    return [fit, *([check] if measured or run.kind == "generator" else [])] if run.config else []


def write(verb: str, written: Run, run: Run | None, runs: list[Run], caches: list[Run]) -> str:
    """Return the line that writes latents or samples again, with the checkpoint of the run that is trained again."""
    words: list[str | Path] = [verb, "--config", written.folder / f"{verb}.yaml", "--output", AGAIN / written.name]
    if run is not None:
        words += ["--tokenizer" if verb == "encode" else "--ckpt_path", again(run, checkpoint(written))]
    return line(*words, *latents_again(written, runs, caches))


def latents_again(run: Run, runs: list[Run], caches: list[Run]) -> list[str | Path]:
    """Return what gives a generator the new tokenizer and its latents: both or none, for they must fit each other."""
    path = run.tokenizer_path
    tokenizer = next((other for other in runs if other.config and other.within(path)), None)
    words: list[str | Path] = (
        ["--model.init_args.tokenizer.init_args.path", again(tokenizer, path)] if tokenizer else []
    )
    prefix = "--data.init_args" if setting(run.config, "data", "class_path") else "--data"
    for subset in ("train", "val", "test"):
        if str(run.data(subset, "class_path")).split(".")[-1] in CACHES:
            cache = next((other for other in caches if other.within(run.data(subset, "init_args", "folder"))), None)
            if cache is None:
                return []
            words += [f"{prefix}.{subset}.init_args.folder", AGAIN / cache.name]
    return words


def checkpoint(written: Run) -> str | None:
    """Return the checkpoint that wrote latents or samples."""
    return text(written.config.get("ckpt_path")) or text(setting(written.config, "tokenizer", "init_args", "path"))


def again(run: Run, path: str | None) -> Path:
    """Return where a file of a run will lie when the run is repeated."""
    return AGAIN / run.name / (run.within(path) or "")


def line(*words: str | Path) -> str:
    """Return a command as a shell takes it."""
    return shlex.join(["aligntok", *map(str, words)])
