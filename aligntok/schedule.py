"""A number that changes over the steps of a run, written as data in the stage's YAML."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

from aligntok.errors import UserError

Schedule = float | dict[int, float]
"""Either a constant, or ``{step: value}`` points joined by straight lines and constant outside them.

``{0: 0.0, 1000: 1e-4}`` is a linear warm-up, ``{4999: 0.0, 5000: 0.5}`` a switch at step 5000. Steps are optimizer
steps.
"""


def value_at(schedule: Schedule, step: int) -> float:
    """Return the value of ``schedule`` at optimizer step ``step``."""
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
    if not isinstance(schedule, dict):
        return 0 if schedule != 0 else None
    steps = sorted(schedule)
    if schedule[steps[0]] != 0:
        return 0
    for left, right in pairwise(steps):
        if schedule[right] != 0:
            return left + 1
    return None
