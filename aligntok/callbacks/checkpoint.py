"""When a run saves itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint


class SaveCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder, written every so many optimizer steps and at the last one.

    ``--ckpt_path last`` goes on from it. The file is replaced only by a complete one.

    >>> save = SaveCheckpoint(every_n_steps=500, keep_every_n_steps=10_000)  # among the `callbacks` of a Trainer
    >>> save.seen_step  # last step that it looked at
    -1

    Args:
        every_n_steps: Optimizer steps between two saves.
        keep_every_n_steps: Optimizer steps between checkpoints that stay, as ``step_0010000.ckpt``; null keeps none.
    """

    def __init__(self, every_n_steps: int = 1000, keep_every_n_steps: int | None = None) -> None:
        self.every_n_steps, self.keep_every_n_steps = every_n_steps, keep_every_n_steps
        self.seen_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not save the step that a resumed run begins with again."""
        self.seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when a step that is due is complete."""
        step = trainer.global_step
        if step == self.seen_step or step == 0 or getattr(trainer, "fast_dev_run", False):
            return  # in the middle of an accumulation nothing may be saved: its gradients would be lost
        self.seen_step = step
        folder = Path(trainer.default_root_dir) / "checkpoints"
        if self.keep_every_n_steps and step % self.keep_every_n_steps == 0:
            trainer.save_checkpoint(folder / f"step_{step:07d}.ckpt", weights_only=False)
        last_of_run = step == trainer.max_steps or (
            trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        )
        if step % self.every_n_steps == 0 or last_of_run:
            trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
