"""What a run says of itself: a summary at the start, a bar with images/s and time left, curves, a record at the end."""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from aligntok.files import write_atomically, write_text, writing
from aligntok.progress import SECONDS_BETWEEN_LINES, pace, print_line
from aligntok.protocols import HasNumImages, offered_data

SMOOTHING = 0.98  # of the step time shown


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with images per second over all ranks and the time left; without a terminal, lines.

    >>> bar = ProgressBar(refresh_rate=20)  # among the `callbacks` of a Trainer; logs train/images_per_s
    >>> bar.step_seconds  # running mean of the time of a batch
    0.0
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        self.terminal = sys.stdout.isatty()
        super().__init__(refresh_rate=refresh_rate if self.terminal else 0)
        self.printed = self.started = self.step_seconds = self.wait_seconds = self.rate = 0.0
        self.ended: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note when the batch was there."""
        self.started = time.perf_counter()
        super().on_train_batch_start(trainer, *args)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        """Average the time of a step, from the end of one batch to the end of the next."""
        now = time.perf_counter()
        if self.ended is not None:
            new = 1 - SMOOTHING if self.step_seconds else 1.0
            self.step_seconds += new * (now - self.ended - self.step_seconds)
            self.wait_seconds += new * (self.started - self.ended - self.wait_seconds)
            num_images = len(next(iter(batch.values()))) * trainer.world_size if isinstance(batch, dict) else 0
            self.rate, wait = num_images / self.step_seconds, self.wait_seconds / self.step_seconds
            # drawn on the device: the host waits for a number that it sends there
            logged = {"train/images_per_s": self.rate, "train/data_wait": wait}
            module.log_dict({name: torch.full((), value, device=module.device) for name, value in logged.items()})
        self.ended = now
        super().on_train_batch_end(trainer, module, out, batch, i)
        due = now - self.printed > SECONDS_BETWEEN_LINES or steps_left(trainer) == 0
        if due and not self.terminal and trainer.is_global_zero:
            self.printed = now
            print_line(self.get_metrics(trainer, module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the time of a validation out of the step time."""
        self.ended = None
        super().on_validation_end(trainer, pl_module)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what stands behind the bar."""
        loss, left = trainer.callback_metrics.get("train/loss"), steps_left(trainer)
        metrics = {"step": trainer.global_step, **({} if loss is None else {"loss": f"{float(loss):.4f}"})}
        seconds = None if left is None else left * trainer.accumulate_grad_batches * self.step_seconds
        return {**metrics, **(pace(self.rate, seconds) if self.step_seconds else {})}


class RunRecord(pl.Callback):
    """Prints what the run will be, and keeps what it was in ``run.json``: steps, seconds, parameters, measures.

    >>> RunRecord().state_dict()  # in checkpoints: the seconds of training so far
    {'seconds': 0.0}
    """

    def __init__(self) -> None:
        self.seconds = self.began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print one block."""
        self.began = time.perf_counter()
        if trainer.is_global_zero:
            print("\n".join(f"  {k + ':':<20}{v}" for k, v in summary(trainer, pl_module).items()), flush=True)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Have the last step measured, whatever the interval: Lightning validates once before it stops early."""
        trainer.should_stop |= is_last_step(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the record."""
        self.seconds += time.perf_counter() - self.began
        self.write(trainer, pl_module)

    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``run.json``, with what was measured last."""
        metrics = {name: round(float(value), 6) for name, value in sorted(trainer.callback_metrics.items())}
        record = {"stage": type(pl_module).__name__, "steps": trainer.global_step, "seconds": round(self.seconds, 1)}
        record |= {"parameters": parameters_of(pl_module), "metrics": metrics}
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            write_text(Path(trainer.default_root_dir) / "run.json", json.dumps(record, indent=1))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where nothing was left to do."""
        if not self.began and trainer.is_global_zero:
            left = " but for its last measurement" if self.is_missing(trainer) else ""
            print(f"  the run had reached its end before, at step {trainer.global_step:,}{left}", flush=True)

    def is_missing(self, trainer: pl.Trainer) -> bool:
        """Tell whether this attempt found nothing left to do, but no record of a measurement: a signal ended that."""
        record = Path(trainer.default_root_dir) / "run.json"
        return bool(not self.began and trainer.limit_val_batches and not record.is_file())

    def state_dict(self) -> dict[str, Any]:
        """Keep the training time over resumes."""
        return {"seconds": self.seconds + (time.perf_counter() - self.began if self.began else 0.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = state_dict["seconds"]


class MetricsCSV(Logger):
    """``metrics.csv`` in the run's folder: a row for what was logged at once, a column for each name.

    A resumed run goes on in the same file: what the earlier attempt wrote from its first step on is dropped, and so is
    a line that is not whole, as one that was cut short when it was killed.

    >>> import tempfile
    >>> log = MetricsCSV(tempfile.mkdtemp())
    >>> log.log_metrics({"train/loss": 0.5}, step=9)
    >>> log.save(); log.path.read_text().split()
    ['step,train/loss', '9,0.5']
    """

    name = version = ""  # of the run's folder nothing is added to the path

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.columns: list[str] = []
        self.rows: list[dict[str, Any]] = []  # not yet in the file

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write none: ``config.yaml`` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add a row, which ``save`` writes."""
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self.rows.append(values | {"step": step})

    @rank_zero_only
    def save(self) -> None:
        """Write: new rows behind the others, or the whole file anew where there is a new column."""
        rows, self.rows = self.rows, []
        new = set().union(*rows) - set(self.columns)
        if new:
            end = None if self.columns else min(row["step"] for row in rows)
            rows = [*whole_rows(self.path, end), *rows]
            self.columns = sorted(set().union(*rows))
            write_atomically(self.path, lambda temporary: self.write(rows, temporary, "w"))
        elif rows:
            self.write(rows, self.path, "a")

    def write(self, rows: list[dict[str, Any]], path: Path, mode: str) -> None:
        """Write rows into a new file, under a header, or to the end of an old one."""
        with writing(path), path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    def go_back(self) -> None:
        """Let the next row replace those of its step and later ones: a run goes back to a checkpoint."""
        self.save()
        self.columns = []

    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()


def whole_rows(path: Path, end: int | None) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.csv`` before step ``end`` (or all), without lines that were cut short or torn."""
    if not path.is_file():
        return []
    with path.open(newline="", errors="replace") as file:
        rows = list(csv.DictReader(line for line in file if line.endswith("\n") and "\0" not in line))
    whole = [row for row in rows if None not in row and None not in row.values() and str(row.get("step")).isdigit()]
    return [row for row in whole if end is None or int(row["step"]) < end]


def summary(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, str]:
    """Return what a run prints before its first step."""
    lines, left, ranks = {"stage": type(module).__name__}, steps_left(trainer), trainer.world_size
    data = offered_data(trainer, HasNumImages)
    if data is not None:
        count, val, batch = data.num_images("train"), data.num_images("val"), data.global_batch_size
        lines["data"] = f"{count:,} training images, {val:,} validation, {len(data.classes)} classes"
        lines["global batch"] = f"{batch} = devices x accumulated x batch = {batch_split(trainer)}"
        start, end = trainer.global_step, trainer.global_step + (left or 0)
        begun = f", from step {start:,}" if start else ""
        ends = "" if left is None else f"{begun}, ends at step {end:,} after {end * batch:,} images"
        lines["steps"] = f"{count // batch} per epoch{ends}"
    for part, (trained, frozen) in parameters_of(module).items():
        lines[part] = f"{trained:,} trained, {frozen:,} frozen parameters"
    device = torch.cuda.get_device_name() if module.device.type == "cuda" else module.device.type
    return {**lines, "device": f"{ranks} x {device}, precision {trainer.precision}", "output": trainer.default_root_dir}


def batch_split(trainer: pl.Trainer) -> str:
    """Return how a batch is made: devices x accumulated batches x images of each, such as ``8 x 1 x 32``."""
    data = offered_data(trainer, HasNumImages)
    accumulated: int = trainer.accumulate_grad_batches
    parts = [trainer.world_size, accumulated, *([] if data is None else [data.batch_size])]
    return " x ".join(map(str, parts))


def steps_left(trainer: pl.Trainer) -> int | None:
    """Return the optimizer steps to go, or ``None`` for a run without an end."""
    end = trainer.max_steps
    if end < 0 and trainer.max_epochs and trainer.max_epochs > 0:
        end = trainer.max_epochs * (int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
    return max(0, end - trainer.global_step) if end >= 0 else None


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the run ends with the step that just ended."""
    last_of_epochs = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or last_of_epochs


def parameters_of(module: pl.LightningModule) -> dict[str, list[int]]:
    """Return how many parameters of each part are trained, and frozen; a tokenizer's parts one by one."""
    parts = dict(module.named_children())
    parts |= dict(parts.pop("tokenizer").named_children()) if "tokenizer" in parts else {}
    counts = {part: [0, 0] for part, network in parts.items() if any(True for _ in network.parameters())}
    for part, count in counts.items():
        for parameter in parts[part].parameters():
            count[not parameter.requires_grad] += parameter.numel()
    return counts
