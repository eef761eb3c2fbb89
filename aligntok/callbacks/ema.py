"""The exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

WARMUP = 10  # decay (1 + n) / (10 + n) at the n-th average, until it exceeds `decay`: TensorFlow's rule for its EMA


class EMA(WeightAveraging):
    """Lightning's weight averaging as an EMA with a warm-up, with buffers copied instead of averaged.

    A checkpoint's ``state_dict`` is the average, the raw weights are under ``current_model_state``; validation uses the
    average. The warm-up makes one ``decay`` right for short and long runs. Buffers that a stage measures before its
    first step (the latent's statistics) are taken over as they are. The average lives on the device of the model.

    Args:
        decay: Share of the old average that stays at each step, in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        super().__init__(use_buffers=False, multi_avg_fn=self.average)

    @torch.no_grad()
    def average(self, averages: list[Tensor], weights: list[Tensor], count: Tensor | int) -> None:
        """Move the averages towards the weights, in place."""
        decay = min(self.decay, (1 + int(count)) / (WARMUP + int(count)))
        torch._foreach_lerp_(averages, weights, 1 - decay)

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

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the average in training; elsewhere ``state_dict`` already is the average."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
