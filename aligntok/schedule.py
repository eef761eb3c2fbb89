"""A number that changes over the steps of a run, written as data in the stage's YAML."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

from aligntok.errors import check, check_nonnegative


class CosineDecay:
    """A linear warm-up from 0 to ``peak``, then half a cosine down to ``end``, then constant.

    >>> decay = CosineDecay(peak=1.0, end=0.0, warmup_steps=10, num_steps=110)  # steps of both together
    >>> [round(decay(step), 3) for step in (0, 5, 10, 60, 200)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

    Reference:
        Loshchilov and Hutter, SGDR, arXiv:1608.03983, without restarts.
    """

    def __init__(self, peak: float, end: float, warmup_steps: int, num_steps: int) -> None:
        check(
            0 <= warmup_steps < num_steps,
            f"CosineDecay: warmup_steps {warmup_steps}, num_steps {num_steps}: give 0 <= warmup_steps < num_steps,"
            " which counts the warm-up too",
        )
        check_nonnegative(peak=peak, end=end)
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
    """Return the value of ``schedule`` at optimizer step ``step``.

    >>> [value_at({0: 0.0, 1000: 1e-4}, step) for step in (0, 500, 1000, 2000)]
    [0.0, 5e-05, 0.0001, 0.0001]
    """
    if isinstance(schedule, CosineDecay):
        return schedule(step)
    if not isinstance(schedule, dict):
        return float(schedule)
    steps = sorted(schedule)
    right = bisect_right(steps, step)
    start, end = steps[max(right - 1, 0)], steps[min(right, len(steps) - 1)]
    share = (step - start) / (end - start) if end > start else 0.0
    return float(schedule[start] + share * (schedule[end] - schedule[start]))


def check_schedule(name: str, schedule: Schedule) -> Schedule:
    """Return ``schedule`` if its values are finite and none is below 0, else raise a ``UserError`` with ``name``."""
    if isinstance(schedule, dict):
        check(bool(schedule), f"{name} is an empty schedule: give a number or {{step: value, ...}}")
        check(min(schedule) >= 0, f"{name} has a negative step {min(schedule)}: steps count from 0")
        check_nonnegative(**{f"{name} at step {step}": value for step, value in schedule.items()})
    elif not isinstance(schedule, CosineDecay):
        check_nonnegative(**{name: schedule})
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
    return next((left + 1 for left, right in pairwise(steps) if schedule[right] != 0), None)
