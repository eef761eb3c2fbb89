"""What the programs left in the runs' folders: records, configs, measures over the steps."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from aligntok.errors import UserError, check, words_of
from aligntok.files import misfit

KINDS = ("other", "tokenizer", "generator")  # in the order of training
MARKS = ("run.json", "config.yaml", "metrics.csv", "checkpoints")  # a folder with one of these is a run's
KINDS_IN: dict[str, Any] = {  # a file; see ``misfit``
    "run.json": {
        **{"stage": (str, None), "steps": (int, None), "seconds": (float, None)},
        **{"parameters": ({str: [int]}, None), "metrics": (dict, None)},
    },
    "validate.json": {"checkpoint": (str, None), "metrics": (dict, None), "conditions": (str, None)},
}


class Run:
    """One run: its record, where it has one, its config, its measures over the steps, and the runs it builds on.

    ``parent`` is the run whose weights it started with; ``tokenizer`` the one whose latents a generator learns.

    >>> run = Run(Path("runs/stage1"))  # a folder that is not there is an empty run
    >>> run.name, run.steps, run.value("val/psnr")
    ('stage1', 0, None)
    """

    parent: Run | None = None
    tokenizer: Run | None = None
    colour = "black"

    def __init__(self, folder: Path, config: str = "config.yaml") -> None:
        self.folder, self.name = folder, folder.resolve().name
        self.record, self.validation = read(folder / "run.json"), read(folder / "validate.json")
        self.config, self.rows = read(folder / config), read_rows(folder / "metrics.csv")
        self.per_position = read_rows(folder / "accuracy_per_position.csv")
        self.stage = str(self.record.get("stage") or setting(self.config, "model", "class_path") or "").split(".")[-1]
        self.init_from = text(self.config.get("init_from"))
        known = int(max((row["step"] + 1 for row in self.rows), default=0))  # steps in metrics.csv
        self.steps = max(self.record.get("steps") or 0, known)
        self.planned_steps = setting(self.config, "trainer", "max_steps")
        self.finished = bool(self.record) and known <= (self.record.get("steps") or 0)
        self.validated = self.validation.get("metrics") or {}
        self.metrics = {**(self.record.get("metrics") or {}), **self.validated} if self.finished else {}
        self.names = {*self.metrics, *(name for row in self.rows for name in row)}  # measured at any time
        self.conditions = self.validation.get("conditions") or ""
        # which table it belongs to follows from what it is built from, measured or drew: any package's stage has one
        generates = self.setting("network") or self.picture("samples") or any("val/gf" in name for name in self.names)
        builds = self.setting("tokenizer") or self.picture("step") or "val/psnr" in self.names
        self.kind = "generator" if generates else "tokenizer" if builds else "other"
        used = re.search(r"num_steps=(\d+)", self.conditions)
        self.sampling_steps = int(used[1]) if used else self.setting("sampler", "init_args", "num_steps")
        sampler = str(self.setting("sampler", "class_path") or "").split(".")[-1]
        self.sampling = sampler + (f", {self.sampling_steps} steps" if sampler and self.sampling_steps else "")
        scales = self.setting("guidance", "init_args", "scale"), self.setting("sampler", "init_args", "guidance_scale")
        self.guidance = scales[0] or scales[1]

    def __str__(self) -> str:
        return self.name

    @property
    def ancestors(self) -> list[Run]:
        """The runs that it builds on, nearest first."""
        return [self.parent, *self.parent.ancestors] if self.parent else []

    def value(self, name: str) -> float | None:
        """Return a final measure, or ``None`` where it is missing or no number."""
        return number(self.metrics.get(name))

    def curve(self, name: str, chained: bool = False) -> list[tuple[float, float]]:
        """Return (steps done, value) over the run; ``chained``: counted on from the runs that it builds on."""
        offset = sum(run.steps for run in self.ancestors) if chained else 0
        points = [(row["step"] + 1 + offset, row[name]) for row in self.rows if name in row]
        return [*(self.parent.curve(name, True)[-1:] if chained and points and self.parent else []), *points]

    def measured_at(self, name: str) -> int:
        """Return after how many steps the final value was taken."""
        curve = [] if name in self.validated else self.curve(name)
        return int(curve[-1][0]) if curve else self.steps

    def parts(self, trained: bool) -> dict[str, int]:
        """Return the parameters of each part that has trained, or frozen, ones."""
        pairs = self.record.get("parameters") or {}
        return {part: pair[0 if trained else 1] for part, pair in pairs.items() if pair[0 if trained else 1]}

    def picture(self, name: str) -> Path | None:
        """Return its last picture: of reconstructions (``step``), or of a generator's ``samples``."""
        return max((self.folder / "images").glob(f"{name}_*.png"), default=None)

    def setting(self, *keys: str) -> Any:
        """Return what the config says under ``model.init_args``, or ``None``."""
        return setting(self.config, "model", "init_args", *keys)

    def data(self, *keys: str) -> Any:
        """Return what the config says of the data, whether they have a class path or not."""
        return setting(self.config, "data", "init_args", *keys) or setting(self.config, "data", *keys)

    def callback(self, name: str) -> dict[str, Any]:
        """Return the arguments of a callback, from the mapping or the list of a config; empty where there is none."""
        named, listed = self.config.get("callbacks"), setting(self.config, "trainer", "callbacks")
        entries = [*(named.values() if isinstance(named, dict) else []), *(listed if isinstance(listed, list) else [])]
        found = (c for c in entries if str(setting(c, "class_path")).rpartition(".")[2] == name)
        return setting(next(found, None), "init_args") or {}

    def sweep(self, name: str) -> list[tuple[float, float]]:
        """Return (sampling steps, final measure), fewest first: of ``<name>_steps<n>`` and the run's own sampler."""
        tried = [key for key in self.metrics if re.match(rf"{re.escape(name)}_steps\d+$", key)]
        found = {int(key.rpartition("_steps")[2]): key for key in tried}
        if self.sampling_steps is not None:
            found[self.sampling_steps] = name
        return [(num, value) for num, key in sorted(found.items()) if (value := self.value(key)) is not None]

    def measured_on(self) -> str:
        """Return what decides on which images it was measured: measures of two runs compare only if this is equal."""
        if self.kind == "generator":
            quality = {k: v for k, v in self.callback("GenerationQuality").items() if k not in ("batch_size", "sweep")}
            images = self.data("train", "init_args", "images") or self.data("train")
            what: list[Any] = [quality, None if quality.get("reference") else images]
        else:
            keys = ["val", "image_size", *([] if isinstance(self.data("val"), dict) else ["train", "holdout", "seed"])]
            what = [{key: self.data(key) for key in keys}, setting(self.config, "trainer", "limit_val_batches")]
        return json.dumps(what, sort_keys=True, default=str)

    def within(self, file: Any) -> Path | None:
        """Return a file's path in this run's folder, or in that of its config, if it was moved; ``None`` of others."""
        path = Path(text(file) or "/").resolve()
        for folder in (self.folder.resolve(), Path(text(self.config.get("output")) or self.folder).resolve()):
            if folder in (path, *path.parents):
                return path.relative_to(folder)
        return None


def find_runs(folder: Path) -> list[Run]:
    """Read the runs in a folder, earlier stages first; raise a ``UserError`` where there are none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}" + (": this is a file" if folder.exists() else ""))
    folders = [path for path in (folder, *sorted(folder.glob("*/"))) if any((path / mark).exists() for mark in MARKS)]
    if not folders:
        raise UserError(f"there is no run in {folder}: give the folder whose subfolders `aligntok fit --output` wrote")
    runs = [Run(path) for path in (folders[:1] if folders[0] == folder else folders)]
    for run in runs:
        starts = (other for other in runs if other.within(run.init_from) and run not in (other, *other.ancestors))
        run.parent = next(starts, None)
        run.tokenizer = next((o for o in runs if o.within(run.setting("tokenizer", "init_args", "path"))), None)
    return sorted(runs, key=lambda run: (KINDS.index(run.kind), bool(run.init_from) + len(run.ancestors), run.name))


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the finite numbers of each row with a step or position; a run may be writing the last row just now."""
    rows = [{name: number(cell) for name, cell in row.items() if name} for row in read(path).get("rows", [])]
    finite = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return [row for row in finite if "step" in row or "position" in row]


def read(path: Path) -> dict[str, Any]:
    """Return the mapping in a file (``rows`` of a table), empty where there is none; refuse what is broken."""
    if not path.is_file():
        return {}
    try:
        content = path.read_text()
        if path.suffix == ".csv":
            return {"rows": list(csv.DictReader(content.splitlines()))}
        found = json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)
        problem = misfit(found, KINDS_IN.get(path.name, dict))
    except (OSError, ValueError, LookupError, TypeError, RecursionError, csv.Error, yaml.YAMLError) as error:
        problem = words_of(error)
    check(not problem, f"{path} is broken: {problem}")
    for part, pair in (found.get("parameters") or {}).items() if path.name == "run.json" else ():
        check(len(pair) == 2, f"{path} is broken: parameters of {part} is {pair!r:.100}")
    return dict(found)


def number(value: Any) -> float | None:
    """Return the finite number that a cell holds."""
    try:
        converted = float(value)
    except (TypeError, ValueError):
        return None
    return converted if math.isfinite(converted) else None


def text(value: Any) -> str | None:
    """Return a string that is not empty, or ``None``."""
    return value if isinstance(value, str) and value else None


def setting(config: Any, *keys: str) -> Any:
    """Return the value under nested keys, or ``None``."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config
