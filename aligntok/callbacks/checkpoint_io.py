"""How a checkpoint gets onto the disk and back: whole or absent."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from aligntok.files import write_atomically
from aligntok.weights.checkpoint import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames; reads tensors and plain values only.

    >>> import tempfile
    >>> io, path = AtomicCheckpointIO(), Path(tempfile.mkdtemp()) / "last.ckpt"  # among the `plugins` of a Trainer
    >>> io.save_checkpoint({"state_dict": {"weight": torch.ones(2)}}, path)
    >>> io.load_checkpoint(path)["state_dict"]["weight"]
    tensor([1., 1.])

    Args:
        ema: Decay of the average that becomes the weights when a checkpoint is read, see ``read_checkpoint``.
    """

    def __init__(self, ema: float | None = None) -> None:
        super().__init__()
        self.ema = ema

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; a full disk leaves the old one untouched."""
        write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; whatever ``weights_only`` says, no code is run."""
        checkpoint = read_checkpoint(path, map_location, self.ema)
        checkpoint.setdefault("pytorch-lightning_version", lightning.__version__)  # an exported one knows none
        return checkpoint
