"""A number that changes over the steps of a run, written as data in the stage's YAML."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

from aligntok.errors import UserError


class CosineDecay:
    """A linear warm-up from 0, then half a cosine down, then constant.

    Args:
        peak: Value at the end of the warm-up.
        end: Value at ``num_steps``.
        warmup_steps: Steps of the warm-up; 0 begins at the peak.
        num_steps: Steps of warm-up and cosine together.

    Raises:
        UserError: The cosine would have no step, or the warm-up is negative.

    Reference:
        Loshchilov and Hutter, SGDR, arXiv:1608.03983, without restarts.
    """

    def __init__(self, peak: float, end: float, warmup_steps: int, num_steps: int) -> None:
        if not 0 <= warmup_steps < num_steps:
            raise UserError(
                f"CosineDecay: warmup_steps {warmup_steps}, num_steps {num_steps}: give 0 <= warmup_steps < num_steps,"
                " which counts the warm-up too"
            )
        self.peak, self.end, self.warmup_steps, self.num_steps = peak, end, warmup_steps, num_steps

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        share = min(1.0, (step - self.warmup_steps) / (self.num_steps - self.warmup_steps))
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * share)) / 2


Schedule = float | dict[int, float] | CosineDecay
"""A constant, ``{step: value}`` points joined by straight lines and constant outside them, or a ``CosineDecay``.

``{0: 0.0, 1000: 1e-4}`` is a linear warm-up, ``{4999: 0.0, 5000: 0.5}`` a switch at step 5000. Steps are optimizer
steps. In YAML, ``{class_path: aligntok.schedule.CosineDecay, init_args: {...}}`` is the last kind.
"""


def value_at(schedule: Schedule, step: int) -> float:
    """Return the value of ``schedule`` at optimizer step ``step``."""
    if isinstance(schedule, CosineDecay):
        return schedule(step)
    if not isinstance(schedule, dict):
        return float(schedule)
    steps = sorted(schedule)
    right = bisect_right(steps, step)
    if right == 0:
        return float(schedule[steps[0]])
    if right == len(steps):
        return float(schedule[steps[-1]])
    start, end = steps[right - 1], steps[right]
    share = (step - start) / (end - start)
    return float(schedule[start] + share * (schedule[end] - schedule[start]))


def check_schedule(name: str, schedule: Schedule) -> Schedule:
    """Return ``schedule`` if it can be evaluated, else raise a ``UserError`` that names ``name``."""
    if isinstance(schedule, dict) and not schedule:
        raise UserError(f"{name} is an empty schedule: give a number or {{step: value, ...}}")
    if isinstance(schedule, dict) and min(schedule) < 0:
        raise UserError(f"{name} has a negative step {min(schedule)}: steps count from 0")
    return schedule


def first_nonzero_step(schedule: Schedule) -> int | None:
    """Return the first step at which ``schedule`` is not zero, or ``None`` if it never is."""
    if isinstance(schedule, CosineDecay):
        return int(schedule.warmup_steps > 0)
    if not isinstance(schedule, dict):
        return 0 if schedule != 0 else None
    steps = sorted(schedule)
    if schedule[steps[0]] != 0:
        return 0
    for left, right in pairwise(steps):
        if schedule[right] != 0:
            return left + 1
    return None
