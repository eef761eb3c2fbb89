"""Back to a checkpoint within a run."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import rank_zero_warn

from aligntok.callbacks.progress import MetricsCSV
from aligntok.guard import Guard


def roll_back(trainer: pl.Trainer, guard: Guard, path: Path) -> None:
    """Take weights, averages, optimizer and step from a checkpoint; the data go on behind the bad batches.

    The state is that of a new process which goes on from the checkpoint, but from the next batch of the data.

    Raises:
        UserError: The checkpoint is damaged.
    """
    guard.rollbacks += 1
    step, loop = trainer.global_step, trainer.fit_loop.epoch_loop
    restore = trainer._checkpoint_connector  # private: Lightning restores at the start of a run alone
    restore._loaded_checkpoint = checkpoint = trainer.strategy.load_checkpoint(path)
    saved = checkpoint["loops"]["fit_loop"]
    progress = loop.automatic_optimization.optim_progress
    progress.load_state_dict(saved["epoch_loop.automatic_optimization.optim_progress"])
    loop._batches_that_stepped = saved["epoch_loop.state_dict"]["_batches_that_stepped"]
    restore.restore_model()
    call._call_callbacks_on_load_checkpoint(trainer, checkpoint)
    restore.restore_optimizers_and_schedulers()
    restore._loaded_checkpoint = {}
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.go_back()
    rank_zero_warn(
        f"after {guard.max_bad_steps} bad steps in a row the run goes back from step {step} to {trainer.global_step},"
        f" and on with other images; rollback {guard.rollbacks} of {guard.max_rollbacks}"
    )
