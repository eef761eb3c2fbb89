"""Steps whose gradient is not to be taken: found without a wait, written down, and when they do not end, undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from aligntok.errors import UserError
from aligntok.protocols import HasSourceIndices, offered_data


class PendingCheck(NamedTuple):
    """Whether the gradient of a step was bad, on its way from the device to the host.

    Attributes:
        bad: () bool in the memory of the host.
        arrived: After it ``bad`` may be read; none on the CPU.
        step: The optimizer step.
        ids: Of its images, on the device.
    """

    bad: Tensor
    arrived: torch.cuda.Event | None
    step: int
    ids: list[Tensor]


class Guard:
    """Says which steps are bad: a gradient that is not finite, or whose norm is many times the usual one.

    Nothing here makes the host wait for the device in a step: what is bad stays there, see ``is_bad``, and is counted
    on the host some steps later. All ranks find the same, as their gradients are the same.

    >>> guard = Guard(max_norm_ratio=3.0, norm_memory=2)
    >>> [bool(guard.is_bad({"model": torch.tensor(norm)})) for norm in (9.0, 1.0, 30.0, float("nan"), 7.0)]
    [False, False, True, True, False]

    Args:
        max_bad_steps: So many in a row end the run, or bring it back to its last checkpoint.
        max_norm_ratio: A gradient norm above so many times its running mean is bad; null allows any.
        norm_memory: Good steps that the running mean is over; before it has seen so many, no norm is too large.
        max_rollbacks: How often the run goes back to its last checkpoint before it ends.
    """

    def __init__(
        self,
        max_bad_steps: int = 10,
        max_norm_ratio: float | None = None,
        norm_memory: int = 100,
        max_rollbacks: int = 0,
    ) -> None:
        self.max_bad_steps, self.max_rollbacks = max_bad_steps, max_rollbacks
        self.max_norm_ratio, self.norm_memory = max_norm_ratio, norm_memory
        self.usual: dict[str, Tensor] = {}  # mean of the norm of each group and number of its good steps, (2,)
        self.pending: list[PendingCheck] = []  # that the host has not looked at, the oldest first
        self.bad_steps = 0  # in a row
        self.rollbacks = 0
        self.must_roll_back = False

    def is_bad(self, norms: dict[str, Tensor]) -> Tensor:
        """Return whether a step is bad, () bool on the device, from the gradient norms () of its parameter groups."""
        bad = ~torch.stack(list(norms.values())).isfinite().all()
        if self.max_norm_ratio is None:
            return bad
        for name, norm in norms.items():
            self.usual[name] = self.usual.get(name, torch.zeros(2)).to(norm.device)
            mean, count = self.usual[name]
            bad = bad | ((count >= self.norm_memory) & (norm > self.max_norm_ratio * mean))
        for name, norm in norms.items():
            mean, count = self.usual[name]
            change = (norm - mean) / (count + 1).clamp(max=self.norm_memory)
            self.usual[name] = torch.where(bad, self.usual[name], torch.stack([mean + change, count + 1]))
        return bad

    def expect(self, bad: Tensor, step: int, ids: list[Tensor]) -> None:
        """Send word of a step, on images ``ids``, to the host."""
        on_host = bad.to("cpu", non_blocking=bad.is_cuda)
        arrived = torch.cuda.current_stream().record_event() if bad.is_cuda else None
        self.pending.append(PendingCheck(on_host, arrived, step, ids))

    def count(self, module: pl.LightningModule, keep: int = 0) -> None:
        """Count bad steps in a row and report them; leave the last ``keep`` for later."""
        while len(self.pending) > keep:
            bad, arrived, step, ids = self.pending.pop(0)
            if arrived is not None:
                arrived.synchronize()
            if bad.tolist():
                self.report(module.trainer, step, ids)
            else:
                self.bad_steps = 0

    def report(self, trainer: pl.Trainer, step: int, ids: list[Tensor]) -> None:
        """Write down which images of the source made a step fail; after too many in a row go back, or end the run."""
        self.bad_steps += 1
        numbers, data = torch.cat(ids).tolist() if ids else [], offered_data(trainer, HasSourceIndices)
        if data is not None:
            numbers = data.source_indices("train", numbers)
        folder = Path(trainer.default_root_dir)
        path = folder / "nonfinite_steps.csv"
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{step},{trainer.global_rank},{' '.join(map(str, numbers)) or 'unknown'}\n")
        what = "not finite" if self.max_norm_ratio is None else f"not finite, or {self.max_norm_ratio:g} x the usual"
        rank_zero_warn(f"step {step}: gradient {what}, step skipped; its image ids are in {path}")
        if self.bad_steps < self.max_bad_steps:
            return
        saved = (folder / "checkpoints" / "last.ckpt").exists()
        if saved and self.rollbacks < self.max_rollbacks:
            self.must_roll_back = True
            return
        good = "The last checkpoint is good: resume with --ckpt_path last and" if saved else "Start again with"
        back = f", and the run went back to a checkpoint {self.rollbacks} times before" if self.rollbacks else ""
        raise UserError(
            f"the gradient was {what} in {self.bad_steps} steps in a row up to {step}{back}; image ids in {path}."
            f" {good} a lower learning rate"
        )

    def in_bad_row(self, module: pl.LightningModule) -> bool:
        """Whether a run that can go back has bad steps behind it; a checkpoint of now would be none to go back to."""
        if self.max_rollbacks:
            self.count(module)
        return self.max_rollbacks > 0 and self.bad_steps > 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a run goes on with; nothing where it neither compares norms nor goes back."""
        return {"usual": self.usual, "rollbacks": self.rollbacks} if self.usual or self.rollbacks else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; what was undone since stays counted."""
        self.usual = dict(state.get("usual", {}))
        self.rollbacks = max(self.rollbacks, state.get("rollbacks", 0))
        self.pending, self.bad_steps, self.must_roll_back = [], 0, False
