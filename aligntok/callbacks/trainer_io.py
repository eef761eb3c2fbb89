"""How a run writes its files: checkpoints that are whole or absent, and one CSV over all attempts."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

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


class MetricsCSV(Logger):
    """``metrics.csv`` in the run's folder: a row for what was logged at once, a column for each name.

    A resumed run goes on in the same file. Rows of the earlier attempt from its first step on are dropped, and so is a
    last line that was cut short when the earlier attempt was killed.

    >>> import tempfile
    >>> log = MetricsCSV(tempfile.mkdtemp())
    >>> log.log_metrics({"train/loss": 0.5}, step=9)
    >>> log.save(); log.path.read_text().split()
    ['step,train/loss', '9,0.5']

    Args:
        folder: The run's.
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
        """Write rows, under a header in a new file."""
        with path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()


def whole_rows(path: Path, end: int | None) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.csv`` before step ``end`` (or all), without a last line that was cut short."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if line.endswith("\n")))
    return [row for row in rows if end is None or int(row["step"]) < end]
