"""How a checkpoint gets onto the disk and back: whole or absent, beside the training where that is asked."""

from __future__ import annotations

import copy
from concurrent import futures
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from aligntok.errors import UserError
from aligntok.files import name_again, write_atomically
from aligntok.weights.checkpoint import read_checkpoint
from aligntok.weights.sharded import is_sharded


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames; reads tensors and plain values only.

    In the background it writes a copy in the memory of the host (of a GPU's tensors, pinned), of which there is one at
    a time: each save, each read and the end of the run wait for the write before it.

    >>> import tempfile
    >>> io, path = AtomicCheckpointIO(), Path(tempfile.mkdtemp()) / "last.ckpt"  # among the `plugins` of a Trainer
    >>> weight = torch.ones(2)
    >>> io.save_checkpoint({"state_dict": {"weight": weight}}, path, {"background": True})
    >>> weight += 1  # what is written is what was there
    >>> io.load_checkpoint(path)["state_dict"]["weight"]
    tensor([1., 1.])

    Args:
        ema: Decay of the average that becomes the weights when a checkpoint is read, see ``read_checkpoint``.
    """

    def __init__(self, ema: float | None = None) -> None:
        super().__init__()
        self.ema = ema
        self.writing: futures.Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; a full disk leaves the old one untouched.

        Args:
            checkpoint: Nested tensors and plain values.
            path: The file.
            storage_options: ``{"background": True}`` goes on as soon as there is a copy; ``{"also": [path]}`` gives the
                file further names on the same disk, before ``path``, without another write.

        Raises:
            UserError: The write failed, or one in the background before this one in the background.
        """
        options = {"background": False, "also": [], **(storage_options or {})}
        if not options["background"]:
            self.wait()  # whether that failed no longer matters
            write(checkpoint, [*options["also"], path])
            return
        self.raise_failure()
        held, arrived = copy_on_host(checkpoint)
        executor = futures.ThreadPoolExecutor(1, "checkpoint")
        self.writing = executor.submit(write, held, [*options["also"], path], arrived)
        executor.shutdown(wait=False)  # the thread ends with the write; the interpreter waits for it

    def wait(self) -> BaseException | None:
        """Wait for the write in the background, and return what it failed with, once."""
        if self.writing is None:
            return None
        error = self.writing.exception()
        self.writing = None
        return error

    def raise_failure(self, wait: bool = True) -> None:
        """Raise what the write in the background failed with, or without ``wait`` what is known by now."""
        if (wait or (self.writing and self.writing.done())) and (error := self.wait()):
            raise error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint on all ranks; whatever ``weights_only`` says, no code is run.

        The first rank reads all of the file, to compare it with its checksums; each maps it into memory and reads what
        it uses.
        """
        self.raise_failure()
        pieces = is_sharded(path)  # to be put together on each rank
        if not pieces:
            check_on_first_rank(path)
        checkpoint = read_checkpoint(path, map_location, self.ema, weights=pieces, optimizer=True)
        checkpoint.setdefault("pytorch-lightning_version", lightning.__version__)  # an exported one knows none
        return checkpoint

    def teardown(self) -> None:
        """End with what is on disk; Lightning calls this at the end of a run, however it ends."""
        self.raise_failure()


def check_on_first_rank(path: Any) -> None:
    """Raise a ``UserError`` on all ranks where the first one finds that a file is no checkpoint or is damaged."""
    several = dist.is_available() and dist.is_initialized()
    found: list[UserError | None] = [None]
    if not several or dist.get_rank() == 0:
        try:
            read_checkpoint(path)
        except UserError as error:
            found = [error]
    if several:
        dist.broadcast_object_list(found)
    if found[0] is not None:
        raise found[0]


def write(checkpoint: dict[str, Any], paths: list[Path], arrived: torch.cuda.Event | None = None) -> None:
    """Write a file that has several names, the last one last."""
    if arrived is not None:
        arrived.synchronize()
    first, *others = map(Path, paths)
    write_atomically(first, lambda temporary: torch.save(checkpoint, temporary))
    for path in others:
        name_again(first, path)


def copy_on_host(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """Return a copy whose tensors are in the memory of the host, and what to wait for before they are read.

    Tensors that share memory share it in the copy, too: the file is the same as without a copy.
    """
    memories: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}  # of tensors, by id: what `deepcopy` takes for done
    arrived = None  # the last of the copies, on a GPU

    def add(tensor: Tensor) -> None:
        nonlocal arrived
        memory = tensor.untyped_storage()
        if memory._cdata not in memories:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory)
            held = torch.empty(len(source), dtype=torch.uint8, pin_memory=source.is_cuda)
            memories[memory._cdata] = held.copy_(source, non_blocking=source.is_cuda).untyped_storage()
            arrived = torch.cuda.current_stream().record_event() if source.is_cuda else arrived
        held = torch.empty(0, dtype=tensor.dtype)
        copies[id(tensor)] = held.set_(memories[memory._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())

    apply_to_collection(checkpoint, Tensor, add)
    return copy.deepcopy(checkpoint, copies), arrived
