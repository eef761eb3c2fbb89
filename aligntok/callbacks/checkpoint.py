"""When and how a run saves itself: checkpoints that are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from aligntok.errors import check_nonnegative, check_positive
from aligntok.files import write_atomically
from aligntok.weights.checkpoint import read_checkpoint


class SaveCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder, written every so many optimizer steps and at the last one.

    >>> save = SaveCheckpoint(every_n_steps=500, keep_every_n_steps=10_000)  # among the `callbacks` of a Trainer
    >>> save.seen_step  # last step that it looked at
    -1

    Args:
        every_n_steps: Optimizer steps between two saves.
        keep_every_n_steps: Optimizer steps between checkpoints that stay, as ``step_0010000.ckpt``; null keeps none.
    """

    def __init__(self, every_n_steps: int = 1000, keep_every_n_steps: int | None = None) -> None:
        check_positive(every_n_steps=every_n_steps)
        check_nonnegative(keep_every_n_steps=keep_every_n_steps)
        self.every_n_steps, self.keep_every_n_steps = every_n_steps, keep_every_n_steps
        self.seen_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not save again the step that a resumed run begins with."""
        self.seen_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save when a step that is due is complete."""
        step = trainer.global_step
        if step in (self.seen_step, 0) or getattr(trainer, "fast_dev_run", False):
            return  # in the middle of an accumulation nothing may be saved: its gradients would be lost
        self.seen_step = step
        folder = Path(trainer.default_root_dir) / "checkpoints"
        if self.keep_every_n_steps and step % self.keep_every_n_steps == 0:
            trainer.save_checkpoint(folder / f"step_{step:07d}.ckpt", weights_only=False)
        last_of_epochs = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if step % self.every_n_steps == 0 or step == trainer.max_steps or last_of_epochs:
            trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames; reads tensors and plain values only.

    >>> import tempfile
    >>> io, path = AtomicCheckpointIO(), Path(tempfile.mkdtemp()) / "last.ckpt"  # among the `plugins` of a Trainer
    >>> io.save_checkpoint({"state_dict": {"weight": torch.ones(2)}}, path)
    >>> io.load_checkpoint(path)["state_dict"]["weight"]
    tensor([1., 1.])

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
