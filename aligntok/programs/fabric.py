"""What programs that compute share: a device and its ranks by Lightning Fabric, and work that is dealt to the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from lightning.fabric import Fabric

from aligntok.errors import UserError

SECONDS_BETWEEN_LINES = 10
ROUNDING = ("bf16-true", "16-true")
T = TypeVar("T")


def make_fabric(
    accelerator: str = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: str = "32-true",
) -> Fabric:
    """Return Lightning's Fabric, with its processes started.

    Args:
        accelerator: ``cpu``, ``gpu``, or whatever there is.
        devices: How many per node, or which.
        num_nodes: Machines.
        strategy: How processes find each other, e.g. ``ddp``.
        precision: ``32-true``, or ``bf16-mixed``.

    Raises:
        UserError: This machine has no such devices, or the precision rounds the weights themselves.
    """
    if precision.startswith(ROUNDING):
        raise UserError(
            f"precision {precision} rounds the weights themselves, and what is written would belong to no checkpoint:"
            " use 32-true or bf16-mixed"
        )
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]  # Lightning checks the word
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    fabric.launch()
    return fabric


def on_first_rank(fabric: Fabric, function: Callable[[], T]) -> T:
    """Return what ``function`` returns on rank 0; its ``UserError`` is raised on all ranks, so that none waits."""
    result: Any = None
    problem = None
    if fabric.is_global_zero:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
    result, problem = fabric.broadcast((result, problem))
    if problem is not None:
        raise UserError(problem)
    return result  # type: ignore[no-any-return]


def dealt(fabric: Fabric, blocks: Sequence[range], batch_size: int) -> list[tuple[range, range]]:
    """Return this rank's batches of some blocks of ids, each with its block, in order.

    A batch never spans two blocks, and its size does not follow the number of ranks: a network may round otherwise at
    another one.

    >>> dealt(Fabric(accelerator="cpu", devices=1), [range(0, 5), range(5, 6)], batch_size=3)
    [(range(0, 5), range(0, 3)), (range(0, 5), range(3, 5)), (range(5, 6), range(5, 6))]
    """
    mine = blocks[fabric.global_rank :: fabric.world_size]
    return [(block, block[i : i + batch_size]) for block in mine for i in range(0, len(block), batch_size)]


class Progress:
    """Prints on rank 0 from time to time how far it is, as if all ranks were as far.

    Args:
        fabric: Tells the rank.
        count: Items of this rank.
    """

    def __init__(self, fabric: Fabric, count: int) -> None:
        self.count, self.ranks, self.silent = count, fabric.world_size, not fabric.is_global_zero
        self.done = 0
        self.began = self.printed = time.perf_counter()

    def add(self, count: int) -> None:
        """Count items that are done."""
        self.done += count
        now = time.perf_counter()
        if self.silent or (now - self.printed < SECONDS_BETWEEN_LINES and self.done < self.count):
            return
        self.printed, rate = now, self.done / (now - self.began)
        left = timedelta(seconds=round((self.count - self.done) / rate))
        print(
            f"  {self.done * self.ranks:,}/{self.count * self.ranks:,}  images/s {rate * self.ranks:.0f}  left {left}",
            flush=True,
        )
