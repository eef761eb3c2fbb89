"""The exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from aligntok.errors import check

WARMUP = 10  # decay (1 + n) / (10 + n) at the n-th average, until it exceeds `decay`: TensorFlow's rule for its EMA


class EMA(pl.Callback):
    """Averages the trained weights after each optimizer step; validation uses the average.

    Only parameters that are trained are averaged; buffers and frozen parameters are those of the model. A checkpoint's
    ``state_dict`` is the average, with everything else of the model; the raw trained weights are under
    ``current_model_state``. Thanks to the warm-up one ``decay`` is right for short and long runs: the decay of the n-th
    update is (1 + n) / (10 + n) until that exceeds ``decay``, for 0.9999 after 89,990 updates.

    >>> EMA(0.999).decay_after(5), EMA(0.999).decay_after(100_000)
    (0.4, 0.999)

    Args:
        decay: Share of the old average that stays at each step, in [0, 1); or several, for several averages. The first
            is the one that validation and ``state_dict`` have; a checkpoint holds the others under ``averages``, and
            ``load_tokenizer(path, ema=0.9999)`` or ``--ema 0.9999`` picks one of them.
        warmup: Whether there is a warm-up; without one the decay is constant from the second update on.

    Raises:
        UserError: No decay, one twice, or one that is not in [0, 1).
    """

    def __init__(self, decay: float | list[float] = 0.999, warmup: bool = True) -> None:
        self.warmup = warmup
        self.decays = list(decay) if isinstance(decay, (list, tuple)) else [decay]
        valid = bool(self.decays) and len(set(self.decays)) == len(self.decays) and all(0 <= d < 1 for d in self.decays)
        check(valid, f"EMA: decay {decay}, give a number in [0, 1), or a list of different ones")
        self.forget()

    def forget(self) -> None:
        """Drop all averages."""
        self.weights: dict[str, nn.Parameter] = {}
        self.averages: list[dict[str, Tensor]] = []  # one per decay
        self.loaded: tuple[list[dict[str, Tensor]], int] | None = None  # averages and number of updates
        self.updates = 0
        self.last_step = 0
        self.in_use: bool | None = False  # whether the first average is in the model, the raw weights in its place

    # The average

    def decay_after(self, updates: int, decay: float | None = None) -> float:
        """Return the decay of the next update: the warm-up's, until it exceeds the given one (by default the first)."""
        decay = self.decays[0] if decay is None else decay
        return min(decay, (1 + updates) / (WARMUP + updates)) if self.warmup else decay

    @torch.no_grad()
    def update(self) -> None:
        """Move all averages towards the weights, in place; the first update copies them."""
        weights: Any = list(self.weights.values())
        for decay, average in zip(self.decays, self.averages, strict=True):
            decay_now = self.decay_after(self.updates, decay) if self.updates else 0.0
            self.average(list(average.values()), weights, decay_now)
        self.updates += 1

    def average(self, averages: list[Tensor], weights: list[Tensor], decay: float) -> None:
        """Set each average to ``decay * average + (1 - decay) * weight``."""
        get_ema_multi_avg_fn(decay)(averages, weights, 0)  # type: ignore[no-untyped-call]  # torch's is untyped

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the values of the model's parameters and of the first average, in place; a second call undoes it.

        In ``validate`` there is none, and nothing to do: the checkpoint's average is in the model already.
        """
        in_use, self.in_use = self.in_use, None  # neither, should Ctrl-C fall in here
        for name, parameter in self.weights.items():
            weight, average = parameter.detach(), self.averages[0][name]
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self.in_use = not in_use

    # Training and validation

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew.

        Raises:
            UserError: There is another ``EMA``: each would take the other's average for the raw weights.
        """
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        check(
            sum(isinstance(callback, EMA) for callback in others) < 2,
            "EMA stands twice among the callbacks (in YAML perhaps in `callbacks` and in `trainer.callbacks`): keep"
            " one, it takes several decays",
        )
        self.forget()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy what is trained, now that its dtype and device are final."""
        self.weights = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        self.averages = [{name: p.detach().clone() for name, p in self.weights.items()} for _ in self.decays]
        self.restore()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the run begins."""
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Update the averages when an optimizer step is complete."""
        if trainer.global_step > self.last_step:
            self.last_step = trainer.global_step
            self.update()

    def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
        """Take in a last step whose end another callback did not reach, so that it can be saved."""
        self.on_train_batch_end(trainer)

    def on_validation_start(self, *args: Any) -> None:
        """Validate the average."""
        self.exchange()

    def on_validation_end(self, *args: Any) -> None:
        """Go on with the raw weights."""
        self.exchange()

    def on_train_end(self, *args: Any) -> None:
        """Leave the average in the model."""
        self.exchange()

    # Checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the first average as ``state_dict``, and beside it what differs from it."""
        if not self.averages:
            return
        if self.in_use is None:
            raise RuntimeError("the run ended while weights and average changed places")
        state, other = checkpoint["state_dict"], self.averages[0]
        average = {name: state[name] if self.in_use else other[name] for name in self.weights}
        checkpoint["current_model_state"] = {name: other[name] if self.in_use else state[name] for name in self.weights}
        state.update(average)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.updates), "decays": self.decays}
        others = zip(self.decays[1:], self.averages[1:], strict=True)
        checkpoint["averages"] = {str(decay): average for decay, average in others}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore raw weights and averages in training; elsewhere ``state_dict`` is what is wanted.

        A decay that the checkpoint does not have goes on from its first average.
        """
        if trainer.state.fn != "fit":
            return
        if "averaging_state" not in checkpoint:
            rank_zero_warn("EMA: the checkpoint has no average, it begins with the weights of the checkpoint")
            return
        average = checkpoint["state_dict"]
        pl_module.load_state_dict(average | checkpoint["current_model_state"])
        others = checkpoint.get("averages", {})
        self.last_step = trainer.global_step  # of a run that goes back; at the start of one `on_train_start` says it
        states = [average, *(others.get(str(decay), average) for decay in self.decays[1:])]
        self.loaded = states, int(checkpoint["averaging_state"]["n_averaged"])
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Copy what was loaded into the averages, once there are both: which comes first depends on the strategy."""
        if self.loaded is None or not self.averages:
            return
        states, self.updates = self.loaded
        self.loaded = None
        for average, state in zip(self.averages, states, strict=True):
            for name, value in average.items():
                value.copy_(state[name])
