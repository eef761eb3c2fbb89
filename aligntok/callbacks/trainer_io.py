"""How a run writes its files: checkpoints that are whole or absent, and one CSV over all attempts."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from aligntok.files import write_atomically
from aligntok.weights.checkpoint import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames; reads tensors and plain values only.

    Args:
        ema: Decay of the average that becomes the weights when a checkpoint is read, see ``read_checkpoint``.
    """

    def __init__(self, ema: float | None = None) -> None:
        super().__init__()
        self.ema = ema

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; a full disk leaves the old one untouched."""
        write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; whatever ``weights_only`` says, no code is run."""
        checkpoint = read_checkpoint(path, map_location, self.ema)
        checkpoint.setdefault("pytorch-lightning_version", lightning.__version__)  # an exported one knows none
        return checkpoint


class MetricsCSV(CSVLogger):
    """``metrics.csv`` in the run's folder; a resumed run goes on in the same file, from its own step."""

    @property
    def experiment(self) -> Any:
        """The writer."""
        if self._experiment is None:
            self._experiment = ContinuedWriter(self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Write none: ``config.yaml`` has them."""


class ContinuedWriter(ExperimentWriter):
    """Keeps the rows of earlier attempts up to the step at which this one begins."""

    def _check_log_dir_exists(self) -> None:
        self.earlier = Path(self.metrics_file_path)

    def save(self) -> None:
        """Write; the first time, first drop the rows that this attempt writes again."""
        if self.metrics and self.earlier.is_file() and not self.metrics_keys:
            first = min(row["step"] for row in self.metrics)
            with self.earlier.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < first]
            self.metrics_keys = sorted({key for row in rows for key in row})
            with self.earlier.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
                writer.writeheader()
                writer.writerows(rows)
        super().save()
