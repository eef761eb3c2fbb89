"""What every stage shares: one optimizer, schedules by step, guarded gradients, checkpoints that rebuild themselves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins import hparams_mixin
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from aligntok.errors import UserError
from aligntok.schedule import Schedule, check_schedule, value_at
from aligntok.weights.checkpoint import STAGE_KEY, check_fits, read_checkpoint


class Stage(pl.LightningModule):
    """Base of all stages.

    Args:
        learning_rate: Over the optimizer steps; absolute, never rescaled by batch or devices.
        optimizer: Built with the parameter groups; its own ``lr`` is not used.
        max_nonfinite_steps: So many steps in a row with a gradient that is not finite stop the run; single ones are
            skipped.
    """

    previous_stages: tuple[str, ...] = ()
    """Names of the stages whose checkpoint ``--init_from`` accepts."""

    needs_previous = False
    """Whether the command line refuses to start this stage without ``--init_from``."""

    def __init__(
        self,
        learning_rate: Schedule,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        max_nonfinite_steps: int = 10,
    ) -> None:
        super().__init__()
        if hparams_mixin._given_hyperparameters.get() is not None:
            self.save_hyperparameters(logger=False)  # the CLI's recipe: plain YAML. Modules built by hand are no recipe
        self.learning_rate = check_schedule("learning_rate", learning_rate)
        self.optimizer = optimizer
        self.max_nonfinite_steps = max_nonfinite_steps
        self.nonfinite_steps = 0
        self.batch_ids: list[Tensor] = []
        self.resumed = False

    # What a stage says of itself

    def parameter_groups(self) -> dict[str, tuple[list[nn.Parameter], Schedule]]:
        """Return the optimizer's groups: name to parameters and learning rate. By default all that require grad."""
        return {"model": ([p for p in self.parameters() if p.requires_grad], self.learning_rate)}

    def idle_groups(self) -> Sequence[str]:
        """Return the names of groups that do not learn at this step."""
        return ()

    def init_from(self, path: str | Path) -> None:
        """Start from the weights of a previous stage's checkpoint; call this before ``fit``.

        Raises:
            UserError: No checkpoint, of another stage, or of other shapes.
        """
        checkpoint = read_checkpoint(path)
        stage = checkpoint.get(STAGE_KEY)
        if stage not in self.previous_stages:
            wanted = " or ".join(self.previous_stages) or "no previous stage"
            raise UserError(f"--init_from {path} is of stage {stage}, but {type(self).__name__} starts from {wanted}")
        self.load_previous(checkpoint, path)

    def load_previous(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Take the weights that this stage wants from a previous stage's checkpoint."""
        raise NotImplementedError  # a stage with `previous_stages` defines it

    # Optimisation

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over all groups; each group's learning rate follows its own schedule."""
        groups = self.parameter_groups()
        optimizer = self.optimizer([{"params": p, "lr": 1.0, "name": name} for name, (p, _) in groups.items()])
        for group in optimizer.param_groups:  # the base of LambdaLR: its factor is then the rate itself
            group["lr"] = 1.0
        rates: list[Callable[[int], float]] = [partial(value_at, schedule) for _, schedule in groups.values()]
        scheduler: Any = {"scheduler": LambdaLR(optimizer, rates), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_fit_start(self) -> None:
        """Refuse what cannot go right, and set the modes: Lightning trains in whatever modes the modules came."""
        self.train()
        if self.trainer.precision == "16-mixed":
            raise UserError(
                "precision 16-mixed is not supported (fp16 gradients underflow in a GAN): use bf16-mixed or 32-true"
            )
        if self.trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            raise UserError(
                "trainer.gradient_clip_algorithm value is not supported: gradients are clipped by their norm, remove it"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make all random numbers of a step a function of (seed, step, rank), so that a resumed run is the same run."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        step = self.trainer.fit_loop.total_batch_idx
        torch.manual_seed((seed * 1_000_003 + step) * 4096 + self.global_rank)
        if isinstance(batch, dict) and "id" in batch:
            self.batch_ids.append(batch["id"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure each group's gradient, clip it by its own norm, and skip the step where it is not finite."""
        idle = self.idle_groups()
        norms: dict[str, float] = {}
        for group in optimizer.param_groups:
            parameters = group["params"]
            if group["name"] in idle:
                set_no_gradient(parameters)  # the optimizer then leaves weights and state alone
                continue
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            norms[group["name"]] = float(norm)
            if gradient_clip_val and norms[group["name"]] > gradient_clip_val:  # else nothing to do
                torch.nn.utils.clip_grads_with_norm_(parameters, float(gradient_clip_val), norm)
        self.log_dict({f"train/grad_norm_{name}": norm for name, norm in norms.items()})
        ids, self.batch_ids = self.batch_ids, []
        if all(math.isfinite(norm) for norm in norms.values()):
            self.nonfinite_steps = 0
            return
        for group in optimizer.param_groups:
            set_no_gradient(group["params"])
        self.report_nonfinite(ids)

    def report_nonfinite(self, ids: list[Tensor]) -> None:
        """Write down which images made a step fail, and stop after too many in a row."""
        self.nonfinite_steps += 1
        images = " ".join(str(i) for i in torch.cat(ids).tolist()) if ids else "unknown"
        path = Path(self.trainer.default_root_dir) / "nonfinite_steps.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{self.global_step},{self.global_rank},{images}\n")
        rank_zero_warn(f"step {self.global_step}: gradient not finite, step skipped; its image ids are in {path}")
        if self.nonfinite_steps >= self.max_nonfinite_steps:
            raise UserError(
                f"the gradient was not finite in {self.nonfinite_steps} steps in a row up to {self.global_step}; image"
                f" ids in {path}. The last checkpoint is good: resume with --ckpt_path last and a lower learning rate"
            )

    def log_mean(self, values: dict[str, Tensor], count: int) -> None:
        """Log means () over ``count`` images so that the epoch's value is the mean over all images of all ranks."""
        weight: Any = float(count)  # as an integer, Lightning rounds the count's mean over ranks: 18.5 becomes 18
        self.log_dict(values, batch_size=weight, sync_dist=True, on_step=False, on_epoch=True)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which stage this is."""
        checkpoint[STAGE_KEY] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another stage's checkpoint (weights would fit, optimizer and losses would not) and other sizes."""
        stage = checkpoint.get(STAGE_KEY, type(self).__name__)
        if stage != type(self).__name__:
            raise UserError(
                f"--ckpt_path is of stage {stage}, this run is {type(self).__name__}: --ckpt_path goes on with the same"
                " stage, --init_from starts the next one"
            )
        check_fits(self.state_dict(), checkpoint["state_dict"], "--ckpt_path", "Use the config of that run")
        self.resumed = True


def set_no_gradient(parameters: Sequence[nn.Parameter]) -> None:
    """Drop the gradients, so that the optimizer skips these parameters."""
    for parameter in parameters:
        parameter.grad = None
