"""What a run says of itself: a summary at the start, a bar with images/s and time left, a record at the end."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import nn

from aligntok.files import write_text
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
        self.printed = 0.0
        self.step_seconds = self.wait_seconds = 0.0
        self.images_per_batch = 0
        self.ended: float | None = None
        self.started = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note when the batch was there."""
        self.started = time.perf_counter()
        super().on_train_batch_start(trainer, *args)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Average the time of a step, from the end of one batch to the end of the next."""
        now = time.perf_counter()
        self.images_per_batch = len(next(iter(batch.values()))) * trainer.world_size if isinstance(batch, dict) else 0
        if self.ended is not None:
            decay = SMOOTHING if self.step_seconds else 0.0
            self.step_seconds = decay * self.step_seconds + (1 - decay) * (now - self.ended)
            self.wait_seconds = decay * self.wait_seconds + (1 - decay) * (self.started - self.ended)
            rate, wait = self.images_per_batch / self.step_seconds, self.wait_seconds / self.step_seconds
            pl_module.log_dict({"train/images_per_s": rate, "train/data_wait": wait})
        self.ended = now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, *args)
        done = steps_left(trainer) == 0
        if not self.terminal and trainer.is_global_zero and (now - self.printed > SECONDS_BETWEEN_LINES or done):
            self.printed = now
            print_line(self.get_metrics(trainer, pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the time of a validation out of the step time."""
        self.ended = None
        super().on_validation_end(trainer, pl_module)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what stands behind the bar."""
        metrics: dict[str, Any] = {"step": trainer.global_step}
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            metrics["loss"] = f"{float(loss):.4f}"
        if self.step_seconds:
            left = steps_left(trainer)
            seconds = None if left is None else left * trainer.accumulate_grad_batches * self.step_seconds
            metrics |= pace(self.images_per_batch / self.step_seconds, seconds)
        return metrics


class RunRecord(pl.Callback):
    """Prints what the run will be, and keeps what it was in ``run.json``: steps, seconds, parameters, measures.

    >>> RunRecord().state_dict()  # in checkpoints: the seconds of training so far
    {'seconds': 0.0}
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print one block."""
        self.began = time.perf_counter()
        if trainer.is_global_zero:
            print(summary(trainer, pl_module), flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the record."""
        self.seconds += time.perf_counter() - self.began
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        record = {
            "stage": type(pl_module).__name__,
            "steps": trainer.global_step,
            "seconds": round(self.seconds, 1),
            "parameters": {part: list(counts) for part, counts in parameters_of(pl_module).items()},
            "metrics": {name: round(float(value), 6) for name, value in sorted(trainer.callback_metrics.items())},
        }
        write_text(Path(trainer.default_root_dir) / "run.json", json.dumps(record, indent=1))

    def state_dict(self) -> dict[str, Any]:
        """Keep the training time over resumes."""
        return {"seconds": self.seconds + (time.perf_counter() - self.began if self.began else 0.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = state_dict["seconds"]


def summary(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Return the block that a run prints before its first step."""
    lines = [("stage", type(module).__name__)]
    data = offered_data(trainer, HasNumImages)
    if data is not None:
        count, batch = data.num_images("train"), data.global_batch_size
        lines.append(
            ("data", f"{count:,} training images, {data.num_images('val'):,} validation, {len(data.classes)} classes")
        )
        parts = f"{trainer.world_size} x {data.accumulation} x {data.batch_size}"
        lines.append(("global batch", f"{batch} = devices x accumulated x batch = {parts}"))
        lines.append(("steps", f"{count // batch} per epoch" + end_of(trainer, batch)))
    for part, (trained, frozen) in parameters_of(module).items():
        lines.append((part, f"{trained:,} trained, {frozen:,} frozen parameters"))
    device = torch.cuda.get_device_name() if module.device.type == "cuda" else module.device.type
    lines.append(("device", f"{trainer.world_size} x {device}, precision {trainer.precision}"))
    lines.append(("output", str(trainer.default_root_dir)))
    return "\n".join(f"  {name + ':':<20}{text}" for name, text in lines)


def end_of(trainer: pl.Trainer, batch: int) -> str:
    """Return at what step and after how many images the run ends."""
    left = steps_left(trainer)
    if left is None:
        return ""
    end = trainer.global_step + left
    start = f", from step {trainer.global_step:,}" if trainer.global_step else ""
    return f"{start}, ends at step {end:,} after {end * batch:,} images"


def steps_left(trainer: pl.Trainer) -> int | None:
    """Return the optimizer steps to go, or ``None`` for a run without an end."""
    if trainer.max_steps >= 0:
        return max(0, trainer.max_steps - trainer.global_step)
    if trainer.max_epochs and trainer.max_epochs > 0:
        per_epoch = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        return max(0, trainer.max_epochs * per_epoch - trainer.global_step)
    return None


def parameters_of(module: pl.LightningModule) -> dict[str, tuple[int, int]]:
    """Return trained and frozen parameters of each part of the module, a tokenizer's parts one by one."""
    counts = {}
    for name, child in module.named_children():
        inner = list(child.named_children()) if name == "tokenizer" else [(name, child)]
        for part, network in inner:
            counts[part] = count_parameters(network)
    return {part: pair for part, pair in counts.items() if sum(pair)}


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """Return the number of trained and of frozen parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, trained in sizes if not trained)
