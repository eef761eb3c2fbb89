"""What callbacks that measure have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from torch import Tensor

from aligntok.errors import UserError, check
from aligntok.networks.tokenizer import Tokenizer
from aligntok.protocols import Batch

Outputs = dict[str, Tensor]
T = TypeVar("T")


class Measurement(pl.Callback):
    """Base of callbacks that measure in validation and test; none changes random numbers or modes of the training.

    The order is ``prepare`` before the first step; then, in each validation, ``start``, ``update`` for each batch and
    ``finish``, with the averaged weights in the module where there is an EMA. What ``finish`` returns is logged as
    ``val/<name>`` or ``test/<name>``; it must be the same on all ranks. Lightning's sanity check tries ``start`` and
    ``update`` on a batch before the first step; while ``trainer.sanity_checking``, a ``start`` keeps nothing, and is
    short.

    >>> class Brightness(Measurement):
    ...     def start(self, trainer, module): self.pixels = []
    ...     def update(self, batch, outputs): self.pixels.append(outputs["reconstruction"].mean())
    ...     def finish(self, trainer, module): return {"brightness": sum(self.pixels) / len(self.pixels)}
    """

    needs: tuple[str, ...] = ("reconstruction",)
    """What the module's ``validation_step`` must return: ``reconstruction`` (B, 3, H, W) in [0, 1], ``latent`` (B, C,
    h, w), ``tokens`` (B, N)."""

    started = False

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before the first step: refuse what cannot be measured, and load what will be needed."""

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before the first batch."""

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """After each batch that has images."""

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """After the last batch: return what to log."""
        return {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare, where something will be measured."""
        if stage in ("validate", "test") or (stage == "fit" and trainer.limit_val_batches):
            self.prepare(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start at the first batch: only then have all callbacks put the weights in place that they average."""
        if batch_idx == 0:
            self.started = not trainer.sanity_checking
            self.start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Pass on what is measured."""
        if not self.needs:
            return
        missing = [name for name in self.needs if not isinstance(outputs, dict) or name not in outputs]
        check(
            not missing,
            f"{type(self).__name__}: validation_step of {type(pl_module).__name__} returns no"
            f" {' and no '.join(missing)}: return it in a dict, or remove the callback",
        )
        if len(batch["image"]):
            self.update(batch, outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        if self.started:
            self.started = False
            prefix, values = "test" if trainer.testing else "val", self.finish(trainer, pl_module)
            logged = {f"{prefix}/{name}": torch.as_tensor(value).float() for name, value in values.items()}
            pl_module.log_dict(logged, sync_dist=True)  # the mean of equal values: without it, Lightning warns

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


@contextmanager
def evaluation(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Run networks as Lightning runs a validation step: in eval mode, without gradients, in the trainer's precision."""
    training = module.training
    module.eval()
    try:
        # Lightning's loop enters this context around its own steps; for a callback's it has no other way
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            yield
    finally:
        module.train(training)


def on_first_rank(ranks: pl.Trainer | Fabric, function: Callable[[], T]) -> T:
    """Return on all ranks what a function returns on the first one: whether a file is there may differ between nodes.

    Raises:
        UserError: On all ranks, where the function raises one, so that none waits.
    """
    result: Any = None
    if ranks.is_global_zero:
        try:
            result = function()
        except UserError as error:
            result = error
    result = ranks.strategy.broadcast(result)
    if isinstance(result, UserError):
        raise result
    return result  # type: ignore[no-any-return]


def tokenizer_of(module: Any, who: str) -> Tokenizer:
    """Return the tokenizer of a stage, which the callback ``who`` needs."""
    tokenizer = getattr(module, "tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"{who} needs a stage with a tokenizer, {type(module).__name__} has none: remove the callback")
    return tokenizer
