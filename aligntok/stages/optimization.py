"""How weights learn: one optimizer, learning rates by step, which weights decay, gradients clipped group by group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from aligntok.errors import UserError, check, check_nonnegative, check_positive
from aligntok.guard import Guard
from aligntok.schedule import Schedule, check_schedule, value_at

NO_DECAY = "_no_decay"  # ends the name of the half of a group whose weights do not decay


class ParameterGroup(NamedTuple):
    """Parameters by name that share a learning rate, and are measured and clipped together."""

    parameters: dict[str, nn.Parameter]
    learning_rate: Schedule


@dataclass(frozen=True)
class Optimization:
    """The optimizer of a stage, its learning rate, and what it does where a gradient is not finite.

    Args:
        learning_rate: Over the optimizer steps; absolute, never rescaled by batch or devices.
        optimizer: Built with the parameter groups; its own ``lr`` is not used.
        no_decay: Exempt from weight decay the parameters of fewer than 2 dimensions (biases, norms) and those with one
            of these words in their name; ``None`` exempts none.
        max_nonfinite_steps: So many steps in a row with a gradient that is not finite (or too large, see below) stop
            the run; single ones are skipped.
        max_norm_ratio: A step is skipped, too, where the gradient norm of one of its parameter groups is more than so
            many times the running mean; null skips none. Beware of losses that begin within a run, as a GAN's does.
        norm_memory: Steps that this mean is over; no step is compared before.
        max_rollbacks: So often the run does not stop, but goes back to its last checkpoint, and on with the images
            that come after the bad ones. No checkpoint is written between bad steps then.

    Raises:
        UserError: A number that is out of range; those of the optimizer, too.

    >>> weight = ParameterGroup({"head.weight": nn.Parameter(torch.ones(2, 2))}, 1e-4)
    >>> built = Optimization({0: 0.0, 1000: 1e-4}).build({"model": weight})
    >>> built["optimizer"].param_groups[0]["name"]
    'model'
    """

    learning_rate: Schedule
    optimizer: OptimizerCallable = torch.optim.AdamW
    no_decay: list[str] | None = None
    max_nonfinite_steps: int = 10
    max_norm_ratio: float | None = None
    norm_memory: int = 100
    max_rollbacks: int = 0

    def __post_init__(self) -> None:
        check_schedule("learning_rate", self.learning_rate)
        check_positive(max_nonfinite_steps=self.max_nonfinite_steps, norm_memory=self.norm_memory)
        check_nonnegative(max_rollbacks=self.max_rollbacks)
        ratio = self.max_norm_ratio
        check(ratio is None or 1 < ratio < math.inf, f"max_norm_ratio={ratio}: give a finite number above 1, or null")
        given = getattr(self.optimizer, "keywords", {})
        numbers = {name: value for name, value in given.items() if isinstance(value, (float, tuple, list))}
        what = f"optimizer with {', '.join(f'{name}={value}' for name, value in numbers.items())}"
        finite = all(math.isfinite(value) for value in numbers.values() if isinstance(value, float))
        check(finite, f"{what}: give finite numbers")
        try:
            self.optimizer([nn.Parameter(torch.zeros(1, device="cpu"))])
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{what}: {error}") from error

    def guard(self) -> Guard:
        """Return a new guard of a run's steps."""
        return Guard(self.max_nonfinite_steps, self.max_norm_ratio, self.norm_memory, self.max_rollbacks)

    def build(self, groups: dict[str, ParameterGroup]) -> OptimizerLRScheduler:
        """Return one optimizer over all groups; each group's learning rate follows its own schedule.

        A group with parameters that do not decay is in the optimizer as two, ``NAME`` and ``NAME_no_decay``.
        """
        parts: list[dict[str, Any]] = []
        rates: list[Callable[[int], float]] = []
        for name, group in groups.items():
            for part, names in self.halves(name, group).items():
                options = {"weight_decay": 0.0} if part != name else {}
                parts.append({"params": [group.parameters[n] for n in names], "lr": 1.0, "name": part, **options})
                rates.append(partial(value_at, group.learning_rate))
        optimizer = self.optimizer(parts)
        for built in optimizer.param_groups:  # the base of LambdaLR: its factor is then the rate itself
            built["lr"] = 1.0
        scheduler: Any = {"scheduler": LambdaLR(optimizer, rates), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def halves(self, name: str, group: ParameterGroup) -> dict[str, list[str]]:
        """Return the names of a group's parameters that decay and of those that do not; an empty half is left out."""
        exempt: set[str] = set()
        if self.no_decay is not None:
            words = self.no_decay
            exempt = {n for n, p in group.parameters.items() if p.ndim < 2 or any(word in n for word in words)}
        halves = {
            name: [n for n in group.parameters if n not in exempt],
            name + NO_DECAY: [n for n in group.parameters if n in exempt],
        }
        return {part: names for part, names in halves.items() if names}


def parameters_by_group(optimizer: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each group, its two halves together."""
    groups: dict[str, list[nn.Parameter]] = {}
    for part in optimizer.param_groups:
        groups.setdefault(part["name"].removesuffix(NO_DECAY), []).extend(part["params"])
    return groups


def clip_(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients down to a norm of at most ``max_norm``, and return the norm () that they had; also of shards."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step of an optimizer does nothing, on the device itself, where its ``found_inf`` is 1.

    That is torch's own way for mixed precision. The fused Adam and AdamW have it; the fused SGD has it too, but takes
    memory that nobody wrote for its momentum after a first step that was skipped.
    """
    adam = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)  # a subclass may step in a way of its own
    return adam and getattr(optimizer, "_step_supports_amp_scaling", False)


def drop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Let the optimizer leave these parameters and their state alone in this step."""
    for parameter in parameters:
        parameter.grad = None
