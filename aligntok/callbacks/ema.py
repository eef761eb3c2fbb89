"""The exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA(WeightAveraging):
    """Lightning's averaging after every step, with buffers copied instead of averaged, on the device of the model.

    A checkpoint's ``state_dict`` is the average, the raw weights are under ``current_model_state``; validation uses the
    average. Measured statistics (buffers that a stage fills before its first step) must not be mixed with their empty start.

    Args:
        decay: Share of the old average that stays at each step.
    """

    def __init__(self, decay: float = 0.999) -> None:
        # lerp: a frozen weight stays what it is to the last bit, which ``decay * w + (1 - decay) * w`` does not keep
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over what the stage measured after this callback made its copy."""
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over what the stage measured after this callback made its copy."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)
        if trainer.global_step == 0:
            for average, current in zip(self._average_model.module.buffers(), pl_module.buffers(), strict=True):
                average.copy_(current)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average in training; elsewhere ``state_dict`` already is the average, and there is nothing to do."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
