"""Prediction in blocks: written once, by any number of ranks, and going on where a run was killed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from aligntok.errors import UserError


@dataclass(frozen=True)
class Block:
    """Consecutive items of ``data.predict``.

    Attributes:
        number: From 0.
        ids: Of its items.
    """

    number: int
    ids: range


class BlockWriter(pl.Callback):
    """Base of what writes predictions into the run's folder, ``block_size`` items to a file.

    Block k holds the items [k * block_size, (k + 1) * block_size) of ``data.predict`` in order, so what is in it
    depends neither on the number of ranks nor on where a run was cut off. Blocks that an earlier attempt finished are
    neither predicted nor written again; the others are dealt to the ranks. A batch never spans two blocks, and its size
    does not follow the number of ranks: a network may round otherwise at another one.

    A subclass says when a block is finished, collects what ``predict_step`` returns, and writes.

    Args:
        block_size: Items of a block.
        batch_size: Items of a batch on one device.
    """

    def __init__(self, block_size: int, batch_size: int) -> None:
        for name, value in (("block size", block_size), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{type(self).__name__}: {name} {value}, but at least 1 is needed")
        self.block_size, self.batch_size = block_size, batch_size
        self.data: Any = None  # the data module
        self.folder = Path()
        self.blocks: list[Block] = []
        self.plan: list[tuple[Block, bool] | None] = []

    # What a subclass says

    def name(self, block: Block) -> str:
        """Return what messages call a block."""
        return f"block {block.number}"

    @abstractmethod
    def finished(self, block: Block) -> bool:
        """Tell whether the files of a block are there, by a look at names, sizes and headers; asked on rank 0."""

    def intact(self, block: Block) -> bool:
        """Tell whether the files of a finished block are what was written; asked once, on rank 0, in threads."""
        return True

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse a folder that holds something else, with a ``UserError``; called on rank 0 before the first batch."""

    @abstractmethod
    def add(self, block: Block, outputs: Any, batch: Any, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the outputs of a batch; the batches of a block come in order."""

    @abstractmethod
    def write(self, block: Block) -> None:
        """Write a block when its last batch was added; whole or not at all."""

    def complete(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Conclude on rank 0, when the blocks of all ranks are written."""

    # Lightning's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out what is left, deal it to the ranks, and let the data walk it."""
        if stage != "predict":
            return
        self.data = getattr(trainer, "datamodule", None)
        if not hasattr(self.data, "walk"):
            raise UserError(f"{type(self).__name__} needs aligntok's LatentDataModule")
        self.folder = Path(trainer.default_root_dir)
        count, size = self.data.num_images("predict"), self.block_size
        self.blocks = [
            Block(number, range(first, min(first + size, count))) for number, first in enumerate(range(0, count, size))
        ]
        left = on_first_rank(trainer, self.unfinished)
        shares = [self.batches(left[rank :: trainer.world_size]) for rank in range(trainer.world_size)]
        mine = shares[trainer.global_rank]
        # a step may wait for other ranks: all get equally many batches, and at least one; what comes twice is dropped
        spare = max(1, *map(len, shares)) - len(mine)
        self.plan = [(block, ids[-1] == block.ids[-1]) for block, ids in mine] + spare * [None]
        self.data.walk([*(ids for _, ids in mine), *(spare * [self.blocks[0].ids[: self.batch_size]])])
        trainer.predict_loop.return_predictions = False

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check."""
        on_first_rank(trainer, lambda: self.check(trainer, pl_module))

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a batch; write after the last one of a block."""
        planned = self.plan[batch_idx]
        if planned is None:
            return
        block, is_last = planned
        self.add(block, outputs, batch, trainer, pl_module)
        if is_last:
            self.write(block)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the others and conclude, unless something is left (``limit_predict_batches``)."""
        trainer.strategy.barrier("blocks")
        if trainer.is_global_zero:
            missing = sum(not self.finished(block) for block in self.blocks)
            if missing:
                print(f"{missing} of {len(self.blocks)} blocks are left: the same command goes on", flush=True)
            else:
                self.complete(trainer, pl_module)

    # Parts

    def unfinished(self) -> list[Block]:
        """Return the blocks that are missing or broken."""
        there = [block for block in self.blocks if self.finished(block)]
        with ThreadPoolExecutor() as pool:
            intact = dict(zip(there, pool.map(self.intact, there), strict=True))
        for block in there:
            if not intact[block]:
                print(f"{self.name(block)} is not what was written, and is done again", flush=True)
        left = [block for block in self.blocks if not intact.get(block)]
        if there:
            print(f"{len(self.blocks) - len(left)} of {len(self.blocks)} blocks are finished", flush=True)
        return left

    def batches(self, blocks: list[Block]) -> list[tuple[Block, range]]:
        """Return the batches of some blocks, in order."""
        size = self.batch_size
        return [(block, block.ids[i : i + size]) for block in blocks for i in range(0, len(block.ids), size)]


def on_first_rank(trainer: pl.Trainer, function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns on rank 0; its ``UserError`` is raised on all ranks, so that none waits."""
    result, problem = None, None
    if trainer.is_global_zero:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
    result, problem = trainer.strategy.broadcast((result, problem))
    if problem is not None:
        raise UserError(problem)
    return result
