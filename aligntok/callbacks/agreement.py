"""What the ranks of a run tell each other at each step, beside the training and without a wait."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=10)
SHARE = 0.8  # of the timeout after which this gives up: before NCCL does, which ends the process without a word
PATIENCE = 10  # seconds in which the ranks that do not hang answer


class Agreement:
    """Ranks that agree on a number; one that hangs is named.

    They exchange tensors of the CPU in a gloo group of their own, so that no GPU waits, and in the background: each
    call gives the next number and returns the largest one of the call before.

    >>> Agreement().largest(15)  # without a process group
    15

    Args:
        timeout: Time after which a rank that does not call is taken to hang.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self.seconds = SHARE * (timeout or TIMEOUT).total_seconds()
        self.group: Any = None
        self.pending: tuple[Any, Tensor] | None = None
        self.began = time.monotonic()
        self.nodes: list[Any] = []  # name of each rank's machine
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.seconds))
            self.nodes = [None] * dist.get_world_size()
            dist.all_gather_object(self.nodes, os.environ.get("SLURMD_NODENAME", socket.gethostname()), self.group)

    def largest(self, number: int) -> int:
        """Return the largest number that a rank gave at its last call; on a single rank, of this call."""
        if self.group is None:
            return number
        found = self.finish()
        self.began = time.monotonic()
        given = torch.tensor(number)
        self.pending = dist.all_reduce(given, dist.ReduceOp.MAX, self.group, async_op=True), given
        return found

    def finish(self) -> int:
        """Wait for what the last call began, and return the largest number given there."""
        if self.pending is None:
            return 0
        (work, given), self.pending = self.pending, None
        work.wait()
        return int(given)

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(self.group)

    def is_overdue(self) -> bool:
        """Whether the ranks did not agree in time: an error comes from one that hangs."""
        return self.group is not None and time.monotonic() - self.began > self.seconds

    def hanging(self) -> list[int]:
        """Return the ranks that do not answer; the others call this at about the same time.

        They sign in a list of the process group, which rank 0 keeps (or torchrun): the connections among the ranks are
        closed by now.
        """
        store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()  # private: torch shows it nowhere
        missing = [0]  # unless it answers

        def call() -> None:
            store.set(f"aligntok/{me}", "here")
            time.sleep(PATIENCE)
            missing[:] = [rank for rank in range(len(self.nodes)) if not store.check([f"aligntok/{rank}"])]

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(1.5 * PATIENCE)
        return missing
