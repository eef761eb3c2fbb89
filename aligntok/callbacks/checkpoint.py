"""When and how a run saves itself: checkpoints that are whole or absent, also when it ends by an error or a signal."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from aligntok import preemption
from aligntok.callbacks.agreement import Agreement
from aligntok.callbacks.checkpoint_io import AtomicCheckpointIO
from aligntok.callbacks.ema import EMA
from aligntok.callbacks.progress import batch_split, is_last_step
from aligntok.callbacks.rollback import roll_back
from aligntok.errors import UserError, check, check_nonnegative, check_positive
from aligntok.files import check_writable, name_again, read_json, write_text
from aligntok.guard import Guard
from aligntok.networks.quantizers import VectorQuantizer
from aligntok.preemption import Preempted
from aligntok.sharding import ShardedStrategy
from aligntok.weights.checkpoint import read_checkpoint

BEST, BEST_RECORD = "best.json", {"metric": str, "value": float, "step": int}
ADAM = 2  # values that it keeps of each weight that it trains


class SaveCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder, written every so many optimizer steps and at the last one.

    A run that ends by an error or a signal saves the last finished step. Ctrl-C, SIGTERM and SIGUSR1 let the running
    step end; at the next one, or the next batch of a validation, all ranks know of it, and end together: ``Preempted``.
    A second Ctrl-C ends at once. Of a Slurm job in which nobody pressed Ctrl-C, the first rank then requeues it.

    What a step changes is known at its end: weights move after ``on_before_optimizer_step`` alone, and what moves
    earlier (position in the data, running statistics, codes) is kept, as it was, until then.

    >>> save = SaveCheckpoint(every_n_steps=500, keep_every_n_steps=10_000)  # among the `callbacks` of a Trainer
    >>> save.seen_step  # last step that it looked at
    -1

    Args:
        every_n_steps: Optimizer steps between two saves.
        keep_every_n_steps: Optimizer steps between checkpoints that stay, as ``step_0010000.ckpt``: another name of
            the same file, so that nothing is written twice. Null keeps none.
        keep_best: What a validation measures, as ``val/psnr``: the step where it was largest stays as ``best.ckpt``,
            another name of the same file, with its value in ``best.json``. With a minus, ``-val/rfid``, the smallest.
    """

    def __init__(
        self, every_n_steps: int = 1000, keep_every_n_steps: int | None = None, keep_best: str | None = None
    ) -> None:
        check_positive(every_n_steps=every_n_steps)
        check_nonnegative(keep_every_n_steps=keep_every_n_steps)
        self.every_n_steps, self.keep_every_n_steps, self.keep_best = every_n_steps, keep_every_n_steps, keep_best
        self.best = -math.inf  # what it keeps, larger is better
        self.seen_step = self.saved_step = -1
        self.interrupts = 0  # times that Ctrl-C was pressed
        self.in_step = False
        self.finished: dict[str, Any] | None = None  # what a checkpoint of the last step has beside weights ...
        self.moving: list[Tensor] = []  # ... and what forward passes change in place,
        self.moved: list[Tensor] = []  # as it was at the end of that step
        self.ranks = Agreement()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, with our writer where the trainer was given none."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.seen_step, self.interrupts, self.in_step, self.finished = -1, 0, False, None
        take_signals(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Connect the ranks."""
        self.ranks = Agreement(getattr(trainer.strategy, "_timeout", None))  # private: of the process group

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether a checkpoint can be written, and take over Ctrl-C until Lightning ends the fit."""
        self.seen_step = self.saved_step = trainer.global_step  # a resumed run's first step is not saved again
        self.moving = list(moved_by_forward(pl_module))
        record = self.last(trainer).with_name(BEST)
        before = read_json(record, BEST_RECORD) if self.keep_best and record.is_file() else None
        self.best = before["value"] * self.sign if before and before["metric"] == self.keep_best else -math.inf
        if getattr(trainer, "fast_dev_run", False):
            return
        if trainer.is_global_zero:
            check_room(self.last(trainer), trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *args: Any) -> None:
        """Stop now where what is in memory belongs to a finished step, else at the end of this one."""
        self.interrupts += 1
        if self.interrupts > 1 or not (self.in_step or self.ranks.group):
            raise KeyboardInterrupt
        preemption.note(signal.SIGINT)
        print("\nCtrl-C: the running step ends first; once more ends at once, without saving", flush=True)

    def on_train_batch_start(self, *args: Any) -> None:
        """Note that a step runs, or end here."""
        self.in_step = True
        self.end_where_asked()

    def on_validation_batch_start(self, *args: Any) -> None:
        """End here where a signal came."""
        self.end_where_asked()

    def end_where_asked(self) -> None:
        """End the run if a signal came to one of the ranks."""
        if number := self.ranks.largest(preemption.asked):
            raise Preempted(number)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """From here on the weights are no longer those of the last step."""
        self.finished = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Save when a step that is due is complete, or go back to what was saved."""
        step = trainer.global_step
        if step not in (self.seen_step, 0) and not getattr(trainer, "fast_dev_run", False):
            guard = getattr(pl_module, "guard", None)  # of a stage of ours
            if isinstance(guard, Guard) and guard.must_roll_back and not is_last_step(trainer):
                roll_back(trainer, guard, self.last(trainer))
            self.note_step(trainer)  # not in the middle of an accumulation: its gradients would be lost
            if not isinstance(guard, Guard) or not guard.in_bad_row(pl_module) or is_last_step(trainer):
                self.save_where_due(trainer, now=self.seen_step < step)
        self.in_step = False

    def save_where_due(self, trainer: pl.Trainer, now: bool) -> None:
        """Save in the background, of which an error ends the run one step later; the last step, or ``now``, at once."""
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, AtomicCheckpointIO):
            writer.raise_failure(wait=False)
        step, path = self.seen_step, self.last(trainer)
        keep = bool(self.keep_every_n_steps and step % self.keep_every_n_steps == 0)
        now = now or is_last_step(trainer)
        if keep or now or step % self.every_n_steps == 0:
            kept = [path.with_name(f"step_{step:07d}.ckpt")] if keep else []
            options = {"background": not now, "also": kept}
            trainer.save_checkpoint(path, weights_only=False, storage_options=options)
            self.saved_step = step

    @property
    def sign(self) -> int:
        """Minus one where less is better."""
        return -1 if (self.keep_best or "").startswith("-") else 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep this step as ``best.ckpt`` where none was better; after the averaged weights have left the module."""
        if not self.keep_best or self.finished is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        name, measured = self.keep_best.removeprefix("-"), trainer.callback_metrics
        names = [name for name in measured if name.startswith("val/")]
        check(name in measured, f"callbacks.checkpoint.keep_best: no {name} is measured, but {', '.join(names)}")
        value = trainer.strategy.broadcast(float(measured[name]))  # of the first rank: all must agree
        if not self.sign * value > self.best:
            return
        self.best, last, writer = self.sign * value, self.last(trainer), trainer.strategy.checkpoint_io
        best = last.with_name("best.ckpt")
        if self.saved_step != self.seen_step:
            self.save_finished(trainer, also=[best])
        elif trainer.is_global_zero:
            if isinstance(writer, AtomicCheckpointIO):
                writer.raise_failure()  # waits
            name_again(last, best)
        if trainer.is_global_zero:
            record = {"metric": self.keep_best, "value": value, "step": self.seen_step}
            write_text(last.with_name(BEST), json.dumps(record))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step of a run that something else ended, such as ``trainer.max_time``."""
        self.ranks.finish()
        if self.finished is not None and self.seen_step != self.saved_step:
            self.save_finished(trainer)

    def note_step(self, trainer: pl.Trainer) -> None:
        """Keep what a checkpoint of this step holds beside weights and optimizer; the next step changes it early."""
        self.seen_step = trainer.global_step
        self.moved = [tensor.detach().clone() for tensor in self.moving]
        self.finished = {"loops": {"fit_loop": trainer.fit_loop.state_dict()}}
        data: pl.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning
        if data is not None and (state := data.state_dict()):
            self.finished[type(data).__qualname__] = state

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the last finished step, and say how to go on; requeue a job that was preempted, and name who hangs."""
        preemption.forget()
        if isinstance(exception, Preempted):
            self.save_last(trainer, together=True)
            self.hand_back(trainer, exception)
        elif self.ranks.is_overdue():  # and nothing is saved: a GPU that waits for another one cannot be read
            for rank in self.ranks.hanging():
                where, seconds = f"rank {rank} on {self.ranks.nodes[rank]}", self.ranks.seconds
                print(f"  {where} hangs: it did not answer for {seconds:.0f} s", file=sys.stderr, flush=True)
        elif trainer.is_global_zero:
            self.save_last(trainer)

    def hand_back(self, trainer: pl.Trainer, exception: Preempted) -> None:
        """Requeue the Slurm job, unless it was Ctrl-C, and let all ranks end."""
        if trainer.is_global_zero and exception.code != preemption.INTERRUPTED:
            preemption.requeue()
        started: Any = getattr(trainer.strategy.launcher, "procs", [])  # by Lightning, which watches them:
        started.clear()  # the first to end would have the others killed
        self.ranks.wait()

    def save_last(self, trainer: pl.Trainer, together: bool = False) -> None:
        """Save the last finished step where it is not saved yet, on this rank or all together; say how to go on."""
        if self.seen_step < 0 or getattr(trainer, "fast_dev_run", False):
            return
        last, writer = self.last(trainer), trainer.strategy.checkpoint_io
        if isinstance(writer, AtomicCheckpointIO) and writer.wait():
            self.saved_step = -1  # what was to be saved in the background is not
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if self.finished is None and progress.ready == progress.processed and trainer.global_step > self.seen_step:
            self.note_step(trainer)  # another callback failed after the step, before this one could see it
        together = together or not isinstance(trainer.strategy, ShardedStrategy)  # a rank alone has pieces
        if self.finished is not None and self.seen_step != self.saved_step and self.interrupts < 2 and together:
            try:
                self.save_finished(trainer)
            except (UserError, RuntimeError) as error:  # the disk may be full, the device lost
                print(f"  step {self.seen_step} could not be saved: {error}", flush=True)
        if last.exists() and trainer.is_global_zero:
            step = read_checkpoint(last, weights=False)["global_step"]
            print(f"  {last} is of step {step}: --ckpt_path last goes on from there", flush=True)

    @torch.no_grad()
    def save_finished(self, trainer: pl.Trainer, also: Sequence[Path] = ()) -> None:
        """Write ``last.ckpt`` of the last finished step, and its other names; others may be gone, so none waits."""
        assert self.finished is not None
        if self.in_step:  # in validation, codes are averaged ones
            for kept, tensor in zip(self.moved, self.moving, strict=True):
                tensor.copy_(kept)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # save_checkpoint has a barrier
        loops = {**checkpoint["loops"], **self.finished["loops"]}
        whole = {**checkpoint, **self.finished, "loops": loops}
        trainer.strategy.save_checkpoint(whole, self.last(trainer), storage_options={"also": list(also)})
        self.saved_step = self.seen_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep how the batch is split."""
        checkpoint["batch_split"] = batch_split(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say where the run goes on with another split."""
        now = batch_split(trainer)
        before = checkpoint.get("batch_split", now)
        if before != now and trainer.state.fn == "fit" and trainer.is_global_zero:
            what = f"devices x accumulated x batch was {before} and is now {now}"
            print(f"  {what}: images come in the same order, sums round in another way", flush=True)

    @staticmethod
    def last(trainer: pl.Trainer) -> Path:
        """Return the path of the checkpoint that a run goes on from."""
        return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"


def take_signals(trainer: pl.Trainer) -> None:
    """Have Lightning's handlers note a signal, and no more: inside of them it would save, and wait for other ranks."""
    connector = trainer._signal_connector  # private, all three: Lightning has no switch
    connector._sigterm_notifier_fn = connector._slurm_sigusr_handler_fn = preemption.note  # type: ignore[assignment, method-assign]
    # twice per batch, with a wait of the host for the GPU, for what an `Agreement` tells
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def moved_by_forward(module: nn.Module) -> Iterator[Tensor]:
    """Yield what a forward pass in training changes in place and a checkpoint holds: running statistics, codes."""
    saved = set(map(id, module.state_dict(keep_vars=True).values()))
    for part in module.modules():
        if part.training:
            tensors = [*part.buffers(recurse=False), *([part.codebook] if isinstance(part, VectorQuantizer) else [])]
            yield from (tensor for tensor in tensors if id(tensor) in saved)


def check_room(path: Path, trainer: pl.Trainer, module: nn.Module) -> None:
    """Raise a ``UserError`` where a checkpoint cannot be written, or the disk has no room for one."""
    check_writable(path)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it later
    size, free = checkpoint_size(module, callbacks), shutil.disk_usage(path.parent).free
    check(
        size < free,
        f"a checkpoint takes about {size / 1e9:.1f} GB, and the disk of {path.parent} has {free / 1e9:.1f} GB left:"
        " free some space, or give an --output on another disk",
    )


def checkpoint_size(module: nn.Module, callbacks: Iterable[Any]) -> int:
    """Return the bytes of a checkpoint: weights, the averages beside them, what Adam keeps, stage 2's frozen copy."""
    averages = sum(len(callback.decays) for callback in callbacks if isinstance(callback, EMA))
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    anchor = getattr(module, "anchor", None)
    held = [*module.state_dict().values(), *(anchor.network.state_dict().values() if anchor else ())]
    return int(sum(value.nbytes for value in held)) + (ADAM + averages) * trained
