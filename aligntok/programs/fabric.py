"""What programs that compute share: a device and its ranks by Lightning Fabric, and work that is dealt to the ranks."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from aligntok import preemption
from aligntok.callbacks.measurement import on_first_rank as on_first_rank  # for the programs, from here
from aligntok.errors import UserError, check, words_of
from aligntok.files import locked
from aligntok.progress import Progress

T = TypeVar("T")


def make_fabric(
    accelerator: str = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: str = "32-true",
) -> Fabric:
    """Return Lightning's Fabric, with its processes started.

    >>> make_fabric("cpu", devices=1).device
    device(type='cpu')

    Args:
        accelerator: ``cpu``, ``gpu``, or whatever there is.
        devices: How many per node, or which.
        num_nodes: Machines.
        strategy: How processes find each other, e.g. ``ddp``.
        precision: ``32-true``, or ``bf16-mixed``.

    Raises:
        UserError: This machine has no such devices, nothing started the other nodes, or the precision rounds the
            weights themselves.
    """
    check_nodes(num_nodes)
    check(
        precision not in ("bf16-true", "16-true"),
        f"precision {precision} rounds the weights themselves, and what is written would belong to no checkpoint: use"
        " 32-true or bf16-mixed",
    )
    try:
        fabric = Fabric(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,  # type: ignore[arg-type]  # Lightning checks the word
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(words_of(error)) from error
    fabric.launch()
    return fabric


def check_nodes(num_nodes: int) -> None:
    """Raise a ``UserError`` where a run would wait for ever for nodes that nothing has started.

    >>> check_nodes(1)
    """
    clusters = (SLURMEnvironment, LSFEnvironment, MPIEnvironment)  # torchrun, and others, say the address
    check(
        num_nodes <= 1 or "MASTER_ADDR" in os.environ or any(cluster.detect() for cluster in clusters),
        f"num_nodes {num_nodes}: nothing started this command on the other nodes, and it would wait for them. Start it"
        " by srun or torchrun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node",
    )


@atexit.register
def leave() -> None:
    """Leave the group of processes before the interpreter ends, in every command, those of Lightning's Trainer too.

    Lightning does so for NCCL alone; threads of gloo that are still there abort the process.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def held(fabric: Fabric, folder: str | Path) -> Iterator[None]:
    """Hold a folder, which all ranks write into; the first one has the lock."""
    with ExitStack() as stack:
        on_first_rank(fabric, lambda: stack.enter_context(locked(folder)))
        yield


def unfinished(what: str, blocks: Sequence[range], is_finished: Callable[[range], bool]) -> list[range]:
    """Return the blocks of ids that are not finished, and say how many are.

    >>> unfinished("blocks", [range(0, 5), range(5, 6)], lambda ids: 0 in ids)
    1 of 2 blocks are finished
    [range(5, 6)]
    """
    with ThreadPoolExecutor() as pool:
        finished = list(pool.map(is_finished, blocks))
    if any(finished):
        print(f"{sum(finished)} of {len(blocks)} {what} are finished", flush=True)
    return [ids for ids, good in zip(blocks, finished, strict=True) if not good]


def dealt(fabric: Fabric, blocks: Sequence[range], batch_size: int) -> list[tuple[range, range]]:
    """Return this rank's batches of some blocks of ids, each with its block, in order.

    A batch never spans two blocks, and its size does not follow the number of ranks: a network may round otherwise at
    another one.

    >>> dealt(Fabric(accelerator="cpu", devices=1), [range(0, 5), range(5, 6)], batch_size=3)
    [(range(0, 5), range(0, 3)), (range(0, 5), range(3, 5)), (range(5, 6), range(5, 6))]
    """
    mine = blocks[fabric.global_rank :: fabric.world_size]
    return [(block, block[i : i + batch_size]) for block in mine for i in range(0, len(block), batch_size)]


def until_signal(fabric: Fabric, work: Iterable[T]) -> Iterator[T]:
    """Yield this rank's pieces of work until a signal comes, then wait until the other ranks end, too.

    Raises:
        Preempted: On all ranks, where one has left some of its work; the same command does it. A Slurm job is requeued.
    """
    asked = 0
    for piece in work:
        if asked := preemption.asked:
            break
        yield piece
    children = getattr(fabric.strategy.launcher, "procs", [])  # that Fabric started; Slurm's signals reach all ranks
    for child in children if asked else ():
        child.send_signal(signal.SIGTERM)
    if number := int(fabric.all_reduce(torch.tensor(asked, device=fabric.device), reduce_op="max")):  # type: ignore[arg-type]
        if fabric.is_global_zero:
            preemption.requeue()
        children.clear()  # else the first of them to end would have the others killed
        fabric.barrier()
        raise preemption.Preempted(number)


def progress_of(fabric: Fabric, what: str, blocks: Sequence[range]) -> Progress:
    """Return what says on the first rank how far all of them are with some blocks."""
    return Progress(what, sum(map(len, blocks)), fabric.world_size, silent=not fabric.is_global_zero)
