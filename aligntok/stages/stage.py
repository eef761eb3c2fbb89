"""What every stage shares: one optimizer, schedules by step, guarded gradients, checkpoints that rebuild themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.core.mixins import hparams_mixin
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from aligntok.errors import UserError, check
from aligntok.randomness import normal, uniform
from aligntok.stages.optimization import (
    Optimization,
    ParameterGroup,
    clip_,
    drop_gradients,
    parameters_by_group,
    skips_on_device,
)
from aligntok.stages.supported import check_precision
from aligntok.weights.checkpoint import check_fits, part_of, read_checkpoint
from aligntok.weights.migration import STAGE_KEY, migrate, split_groups

LAG = 2  # steps after which the host looks at what a GPU found: it is there by then, and nothing waits for it


class Stage(pl.LightningModule):
    """Base of all stages; a subclass gives ``training_step``, and whatever differs of the methods below.

    >>> stage = Stage(Optimization(1e-3))
    >>> stage.layer = torch.nn.Linear(2, 2)
    >>> list(stage.parameter_groups()["model"].parameters)
    ['layer.weight', 'layer.bias']

    Args:
        optimization: Optimizer, learning rate, weight decay, guard against gradients that are not finite.
    """

    needs_previous = False
    """Whether the command line refuses to start this stage without ``--init_from``."""

    def __init__(self, optimization: Optimization) -> None:
        super().__init__()
        # Lightning has no public way to ask whether its command line builds the module. The command line's recipe is
        # plain YAML and goes into the checkpoint; modules that are built by hand are no recipe and would be pickled.
        if hparams_mixin._given_hyperparameters.get() is not None:
            self.save_hyperparameters(logger=False)
        self.optimization = optimization
        self.guard = optimization.guard()
        self.batch_ids: list[Tensor] = []
        self.resumed = False

    # What a stage says of itself

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """Return the optimizer's groups by name; by default one, of all parameters that require grad."""
        learning = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return {"model": ParameterGroup(learning, self.optimization.learning_rate)}

    def idle_groups(self) -> Sequence[str]:
        """Return the names of groups that do not learn at this step."""
        return ()

    def init_from(self, path: str | Path) -> None:
        """Start from the weights of another run's checkpoint; call this before ``fit``.

        Which run it was does not matter, but what the file holds.

        Raises:
            UserError: No checkpoint, one without what this stage needs, or of other shapes; names the key.
        """
        self.load_previous(read_checkpoint(path), path)

    def load_previous(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Take the weights that this stage needs from a checkpoint."""
        raise UserError(f"--init_from {path}: {type(self).__name__} starts from no checkpoint")

    def held(self, part: str, checkpoint: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
        """Return the weights of a part of a checkpoint (the EMA, where the run kept one).

        Raises:
            UserError: It holds none.
        """
        state = part_of(checkpoint["state_dict"], part)
        what = f"--init_from {path} is of stage {checkpoint.get(STAGE_KEY)} and holds no weights {part}.*"
        check(bool(state), f"{what}, which {type(self).__name__} needs")
        return state

    # Before the first step

    def setup(self, stage: str) -> None:
        """Refuse what cannot go right, and train in train mode, in whatever mode the modules came.

        Raises:
            UserError: The precision or the clipping is one that stages do not have; see ``aligntok.stages.supported``.
        """
        check_precision(self.trainer.precision, fit=stage == "fit")
        if stage == "fit":
            by_norm = self.trainer.gradient_clip_algorithm != GradClipAlgorithmType.VALUE
            check(by_norm, "gradient_clip_algorithm value is not supported: gradients are clipped by norm, remove it")
            self.train()

    # Optimisation

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return one optimizer over all groups; each group's learning rate follows its own schedule."""
        return self.optimization.build(self.parameter_groups())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make the numbers that belong to no image, dropout's, a function of (seed, batch, rank): resume is exact."""
        step = self.trainer.fit_loop.total_batch_idx  # counts accumulated batches too; Lightning's loop alone knows it
        torch.manual_seed((self.run_seed * 1_000_003 + step) * 4096 + self.global_rank)
        if isinstance(batch, dict) and "id" in batch:
            self.batch_ids.append(batch["id"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure each group's gradient, clip it by its own norm, and skip the step where it is bad, see ``Guard``.

        Where the optimizer can skip by itself, see ``skips_on_device``, the host of a GPU waits for nothing, and learns
        of the skipped step ``LAG`` steps later, on all ranks alike. Other optimizers make it wait in each step.
        """
        norms: dict[str, Tensor] = {}
        groups = parameters_by_group(optimizer)
        for name, parameters in groups.items():
            if name in self.idle_groups():
                drop_gradients(parameters)
            else:
                norms[name] = clip_(parameters, float(gradient_clip_val) if gradient_clip_val else None)
        self.log_dict({f"train/grad_norm_{name}": norm for name, norm in norms.items()})
        ids, self.batch_ids = self.batch_ids, []
        bad = self.guard.is_bad(norms)
        if skips_on_device(optimizer):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # where torch's GradScaler puts it
        elif bad:
            for parameters in groups.values():
                drop_gradients(parameters)
        self.guard.expect(bad, self.global_step, ids)
        self.guard.count(self, LAG if bad.is_cuda else 0)

    def on_train_end(self) -> None:
        """Look at the last steps."""
        self.guard.count(self)

    # Random numbers that belong to an image

    @property
    def run_seed(self) -> int:
        """The seed of the run, which Lightning's ``seed_everything`` leaves in the environment."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def ids_of(self, batch: dict[str, Any]) -> Tensor:
        """Return what keys the random numbers of a batch: the images' ids, or without these their places, (B,)."""
        if "id" in batch:
            return batch["id"].to(self.device)  # type: ignore[no-any-return]
        count = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        return torch.arange(count, device=self.device) + self.global_rank * count

    def normal(self, batch: dict[str, Any], stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Return standard normal numbers (B, *shape), each a function of (seed, optimizer step, image id) alone."""
        return normal(self.ids_of(batch), self.run_seed, self.global_step, stream, shape)

    def uniform(self, batch: dict[str, Any], stream: str) -> Tensor:
        """Return numbers (B,) in [0, 1), each a function of (seed, optimizer step, image id) alone."""
        return uniform(self.ids_of(batch), self.run_seed, self.global_step, stream)

    # Logs

    @property
    def split(self) -> str:
        """``test`` where a test runs, else ``val``: the first word of what is logged."""
        return "test" if self.trainer.testing else "val"

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """Measure on the test images what validation measures."""
        return self.validation_step(batch, batch_idx)

    def log_terms(self, values: dict[str, Tensor], count: int) -> None:
        """Log the terms of a training step on ``count`` images, at steps that are written as means over all ranks.

        Between these steps the ranks exchange nothing, and the progress bar shows the terms of rank 0's images.
        """
        if dist.is_available() and dist.is_initialized():
            every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it later
            if every and (self.global_step + 1) % every == 0:
                means = torch.stack([value.detach().float() for value in values.values()])
                dist.all_reduce(means)
                values = dict(zip(values, means / dist.get_world_size(), strict=True))
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=count)

    def log_mean(self, values: dict[str, Tensor], count: int) -> None:
        """Log means () over ``count`` images so that the epoch's value is the mean over all images of all ranks."""
        weight: Any = float(count)  # as an integer, Lightning rounds the count's mean over ranks: 18.5 becomes 18
        self.log_dict(values, batch_size=weight, sync_dist=True, on_step=False, on_epoch=True)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which stage this is; a run that must stop for its gradients does so before."""
        self.guard.count(self)
        checkpoint[STAGE_KEY] = type(self).__name__
        if state := self.guard.state_dict():
            checkpoint["guard"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another stage's checkpoint (weights would fit, optimizer and losses would not) and other sizes."""
        name = type(self).__name__
        stage = checkpoint.get(STAGE_KEY, name)
        text = "--ckpt_path goes on with the same stage, --init_from starts the next one"
        check(stage == name, f"--ckpt_path is of stage {stage}, this run is {name}: {text}")
        migrate(checkpoint)
        trains = self._trainer is not None and self._trainer.training
        whole = "optimizer_states" in checkpoint and "lr_schedulers" in checkpoint
        check(whole or not trains, "--ckpt_path holds weights without an optimizer: give it as --init_from")
        if "optimizer_states" in checkpoint:
            groups = self.parameter_groups()
            names = {key: list(group.parameters) for key, group in groups.items()}
            split_groups(
                checkpoint, names, {key: self.optimization.halves(key, group) for key, group in groups.items()}
            )
        check_fits(self.state_dict(), checkpoint["state_dict"], "--ckpt_path", "Use the config of that run")
        self.guard.load_state_dict(checkpoint.get("guard", {}))
        self.batch_ids = []
        self.resumed = True
