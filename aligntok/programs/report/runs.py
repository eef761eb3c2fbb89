"""What ``aligntok fit`` and ``aligntok validate`` left in the runs' folders."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from aligntok.errors import UserError

ENCODER = "EncoderPretraining"
DIFFUSION, AUTOREGRESSION = "LatentDiffusion", "AutoregressiveGeneration"
GENERATORS = (DIFFUSION, AUTOREGRESSION)
STAGES = (
    ENCODER,
    "LatentAlignment",
    "PerceptualAlignment",
    "CausalTokenization",
    "DecoderRefinement",
    *GENERATORS,
)  # in the order of training
MARKS = ("run.json", "config.yaml", "metrics.csv", "checkpoints")  # a folder with one of these is a run's


@dataclass
class Run:
    """One run: its record, where it has one, its config, its measures over the steps, and the runs it builds on.

    ``parent`` is the run whose weights it started with; ``tokenizer`` the one whose latents a generator learns.
    """

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    per_position: list[dict[str, float]] = field(default_factory=list)
    parent: Run | None = None
    tokenizer: Run | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def stage(self) -> str:
        """The class of the stage, or nothing where no file says it."""
        class_path = (self.config.get("model") or {}).get("class_path") or ""
        return str(self.record.get("stage") or class_path.rpartition(".")[2])

    @property
    def is_generator(self) -> bool:
        """Whether it learns latents or tokens, not images."""
        return self.stage in GENERATORS

    @property
    def finished(self) -> bool:
        """Whether it reached its end, and was not taken up again since."""
        return bool(self.record) and self.last_step <= self.record.get("steps", 0)

    @property
    def last_step(self) -> int:
        """Optimizer steps of which ``metrics.csv`` knows."""
        return int(max((row["step"] + 1 for row in self.rows), default=0))

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return max(int(self.record.get("steps", 0)), self.last_step)

    @property
    def planned_steps(self) -> int | None:
        """Steps that the config asks for."""
        steps = (self.config.get("trainer") or {}).get("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def metrics(self) -> dict[str, float]:
        """The final measures; none of an unfinished run. Those of ``aligntok validate`` go first."""
        return {**self.record.get("metrics", {}), **self.validated} if self.finished else {}

    @property
    def validated(self) -> dict[str, float]:
        """What ``aligntok validate`` measured."""
        return dict(self.validation.get("metrics") or {})

    @property
    def init_from(self) -> str | None:
        """The checkpoint that it started from."""
        return self.config.get("init_from") or None

    @property
    def depth(self) -> int:
        """How many runs came before it."""
        return 0 if not self.init_from else 1 + (self.parent.depth if self.parent else 0)

    @property
    def offset(self) -> int:
        """Steps of the runs that it builds on."""
        return self.parent.offset + self.parent.steps if self.parent else 0

    def value(self, name: str) -> float | None:
        """Return a final measure, or ``None`` where it is missing or no number."""
        value = self.metrics.get(name)
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return (steps done, value) over the run."""
        return [(row["step"] + 1, row[name]) for row in self.rows if name in row]

    def measured_at(self, name: str) -> int | None:
        """Return after how many steps the final value was taken."""
        curve = self.curve(name)
        return int(curve[-1][0]) if curve and name not in self.validated else None

    def parts(self, trained: bool) -> dict[str, int]:
        """Return the parameters of each part that has trained, or frozen, ones."""
        pairs = self.record.get("parameters", {})
        return {part: pair[0 if trained else 1] for part, pair in pairs.items() if pair[0 if trained else 1]}

    def picture(self, name: str = "step") -> Path | None:
        """Return its last picture: of reconstructions (``step``), or of a generator's ``samples``."""
        return max((self.folder / "images").glob(f"{name}_*.png"), default=None)

    def setting(self, *keys: str) -> Any:
        """Return what the config says under ``model.init_args``, or ``None``."""
        return setting(self.config, "model", "init_args", *keys)

    def callback(self, name: str) -> dict[str, Any]:
        """Return the arguments of a callback in the config, empty where there is none of this class."""
        for callback in setting(self.config, "trainer", "callbacks") or []:
            if str(callback.get("class_path")).rpartition(".")[2] == name:
                return callback.get("init_args") or {}
        return {}

    @property
    def conditions(self) -> str:
        """What ``aligntok validate`` says that a generator was measured on."""
        return str(self.validation.get("conditions") or "")

    def condition(self, pattern: str, otherwise: Any) -> Any:
        """Return the number that a pattern finds in the conditions, else what the config says."""
        found = re.search(pattern, self.conditions)
        return float(found[1].replace(",", "")) if found else otherwise

    @property
    def num_samples(self) -> str:
        """How many samples a generator was measured on, for people."""
        number = self.condition(r"([\d,]+) images of", self.callback("GenerationQuality").get("num_samples"))
        return f"{number:,.0f}" if isinstance(number, (int, float)) else "all"

    @property
    def sampling_steps(self) -> int | None:
        """The sampler's number of updates."""
        steps = self.condition(r"num_steps=(\d+)", self.setting("sampler", "init_args", "num_steps"))
        return int(steps) if isinstance(steps, (int, float)) else None

    def sweep(self, name: str) -> list[tuple[float, float]]:
        """Return (sampling steps, final measure), fewest first: of ``<name>_steps<n>`` and the run's own sampler."""
        tried = [key for key in self.metrics if re.match(rf"{name}_steps\d+$", key)]
        found = {int(key.removeprefix(f"{name}_steps")): key for key in tried}
        if self.sampling_steps is not None:
            found[self.sampling_steps] = name
        return [(num, value) for num, key in sorted(found.items()) if (value := self.value(key)) is not None]

    def measured_on(self) -> str:
        """Return what decides on which images it was measured: measures of two runs compare only if this is equal."""
        data = self.config.get("data") or {}
        if self.is_generator:
            quality = {k: v for k, v in self.callback("GenerationQuality").items() if k not in ("batch_size", "sweep")}
            images = setting(data, "train", "init_args", "images") or data.get("train")
            given = quality.get("reference")
            return json.dumps([quality, None if given else [images, data.get("crop")]], sort_keys=True, default=str)
        keys = ["val", "image_size", "crop", *([] if data.get("val") else ["train", "holdout", "seed"])]
        limit = (self.config.get("trainer") or {}).get("limit_val_batches")
        return json.dumps([{key: data.get(key) for key in keys}, limit], sort_keys=True, default=str)


def find_runs(folder: Path) -> list[Run]:
    """Read the runs in a folder, earlier stages first.

    Raises:
        UserError: There is no such folder, no run in it, or a file of a run is broken.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}" + (": this is a file" if folder.exists() else ""))
    folders = (
        [folder] if is_run(folder) else sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))
    )
    if not folders:
        raise UserError(f"there is no run in {folder}: give the folder whose subfolders `aligntok fit --output` wrote")
    runs = [read_run(path) for path in folders]
    for run in runs:
        run.parent = next((other for other in runs if other is not run and wrote(other, run.init_from)), None)
        run.tokenizer = next((other for other in runs if wrote(other, tokenizer_path(run.config))), None)
    break_circles(runs)
    known = {stage: rank for rank, stage in enumerate(STAGES)}
    return sorted(runs, key=lambda run: (known.get(run.stage, len(STAGES)), run.depth, run.name))


def is_run(folder: Path) -> bool:
    """Tell whether a run wrote into this folder."""
    return any((folder / mark).exists() for mark in MARKS)


def read_run(folder: Path) -> Run:
    """Read what a run left; what is not there (yet) stays empty."""
    return Run(
        folder,
        record=read_json(folder / "run.json"),
        config=read_yaml(folder / "config.yaml"),
        validation=read_json(folder / "validate.json"),
        rows=read_rows(folder / "metrics.csv"),
        per_position=read_rows(folder / "accuracy_per_position.csv", "position"),
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a config, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is broken: {' '.join(str(error).split())[:200]}") from error
    return content if isinstance(content, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a file, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is broken: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is broken: it holds no mapping")
    return content


def read_rows(path: Path, key: str = "step") -> list[dict[str, float]]:
    """Return the finite numbers of each row that has a ``key``; a run may be writing the last row just now."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [{key: number(text) for key, text in row.items() if key} for row in csv.DictReader(file)]
    finite = [{key: value for key, value in row.items() if value is not None} for row in rows]
    return [row for row in finite if key in row]


def number(text: Any) -> float | None:
    """Return the finite number that a cell holds."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def setting(config: Any, *keys: str) -> Any:
    """Return the value under nested keys, or ``None``."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def tokenizer_path(config: dict[str, Any]) -> str | None:
    """Return the checkpoint that a generator's config names as its tokenizer."""
    path = setting(config, "model", "init_args", "tokenizer", "init_args", "path")
    return path if isinstance(path, str) else None


def wrote(run: Run, checkpoint: str | None) -> bool:
    """Tell whether a checkpoint is a run's: under its folder, or under that of its config, if it was moved."""
    if checkpoint is None:
        return False
    folders = [run.folder.resolve(), *([Path(run.config["output"]).resolve()] if run.config.get("output") else [])]
    return any(folder in Path(checkpoint).resolve().parents for folder in folders)


def break_circles(runs: list[Run]) -> None:
    """Forget the parents of runs that would be their own ancestors."""
    for run in runs:
        seen, ancestor = {id(run)}, run.parent
        while ancestor is not None and id(ancestor) not in seen:
            seen.add(id(ancestor))
            ancestor = ancestor.parent
        if ancestor is not None:
            run.parent = None
