"""How much of a codebook is in use, in training and on the validation images."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from aligntok.callbacks.measurement import Measurement, Outputs
from aligntok.errors import check
from aligntok.networks.quantizers import VectorQuantizer
from aligntok.protocols import Batch


class CodebookHealth(Measurement):
    """Use of the codes: in training over windows of steps, in validation over all images, each over all ranks.

    Logs ``train/codebook_usage`` (share of the codes that were chosen at all), ``train/codebook_perplexity`` (number of
    codes in equal use that would have the same entropy) and ``train/codebook_dead`` (codes that were never chosen), of
    the last full window; and ``val/codebook_usage``, ``val/codebook_perplexity`` and ``val/codebook_entropy`` (of the
    distribution of codes, in bits). A quantizer that does not learn is measured in validation alone.

    >>> callback = CodebookHealth(window=50, min_usage=0.2)  # among the `callbacks` of a Trainer
    >>> callback.health  # of the last full window: usage, perplexity, dead
    {}

    Args:
        window: Batches of a window.
        min_usage: Usage under which a window counts as a collapse: the run warns, once.

    Raises:
        UserError: The module has no quantizer.
    """

    needs = ("tokens",)

    def __init__(self, window: int = 100, min_usage: float = 0.1) -> None:
        words = f"CodebookHealth: window {window}, min_usage {min_usage}: give at least 1 and 0 to 1"
        check(window >= 1 and 0 <= min_usage <= 1, words)
        self.window, self.min_usage = window, min_usage
        self.batches, self.warned = 0, False
        self.health: dict[str, float] = {}
        self.logged: dict[str, torch.Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look for the quantizer, which is measured in training too."""
        self.quantizer: Any = getattr(getattr(pl_module, "tokenizer", None), "quantizer", None)
        check(self.quantizer is not None, "CodebookHealth needs a tokenizer with a quantizer: remove the callback")

    # Training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a window."""
        self.batches = 0
        self.quantizer.reset_counts()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Measure at the end of a window, where the host waits; log at every step: no logging interval misses it."""
        if not self.quantizer.training:
            return
        self.batches += 1
        if self.batches == self.window:
            self.health = self.quantizer.health(self.quantizer.counts)
            self.batches = 0
            self.quantizer.reset_counts()
            if self.health["usage"] < self.min_usage and not self.warned:
                self.warned = True
                rank_zero_warn(collapse(self.health, self.quantizer, self.window, trainer.global_step))
            # kept on the device: the host waits for a number that it sends there
            logged = {f"train/codebook_{name}": value for name, value in self.health.items()}
            self.logged = {name: torch.full((), value, device=pl_module.device) for name, value in logged.items()}
        pl_module.log_dict(self.logged)

    # Validation

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start counting."""
        self.counts = torch.zeros(self.quantizer.codebook_size, dtype=torch.int64, device=module.device)

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Count the tokens of a batch."""
        self.counts += torch.bincount(outputs["tokens"].flatten(), minlength=len(self.counts))

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Return the use of the codes by the images of all ranks."""
        if trainer.world_size > 1:
            dist.all_reduce(self.counts)
        health = self.quantizer.health(self.counts)
        return {
            "codebook_usage": health["usage"],
            "codebook_perplexity": health["perplexity"],
            "codebook_entropy": math.log2(health["perplexity"]),
        }


def collapse(health: dict[str, float], quantizer: VectorQuantizer, window: int, step: int) -> str:
    """Return the warning of a collapsed codebook, with the switches that are not on yet."""
    remedies = {
        "update clustering (codes in little use move to where the vectors are)": quantizer.update != "clustering",
        "kmeans_start true": not quantizer.kmeans_start,
        "gradient rotation": quantizer.gradient != "rotation",
    }
    switches = ", ".join(name for name, helps in remedies.items() if helps)
    return (
        f"step {step}: the codebook has collapsed, {health['usage']:.1%} of its {quantizer.codebook_size} codes were"
        f" chosen in the last {window} batches (perplexity {health['perplexity']:.0f}). What helps: a lower"
        f" learning_rate or a longer warm-up" + (f"; of the quantizer {switches}" if switches else "")
    )
