"""What the jobs of these tests run beside their training."""

import os
import time
from pathlib import Path

import lightning.pytorch as pl


class Slowed(pl.Callback):
    """One rank is slow, until the job was requeued so many times; the first one writes down how far it is.

    Args:
        seconds: Of each step and validation batch.
        rank: The slow one.
        times: Requeued so often, the job is no longer slow.
    """

    def __init__(self, seconds: float = 0.0, rank: int = 1, times: int = 1000) -> None:
        fast = int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= times
        self.seconds, self.rank = 0.0 if fast else seconds, rank

    def wait(self, trainer, *args):
        """Be slow, and write down the step."""
        if trainer.global_rank == self.rank:
            time.sleep(self.seconds)
        if trainer.is_global_zero:
            Path(trainer.default_root_dir, "step").write_text(str(trainer.global_step))

    on_train_batch_start = on_validation_batch_start = wait
