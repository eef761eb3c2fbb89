"""Checkpoints that are folders: each rank writes its pieces of the weights, and any number of ranks reads them.

What is no piece is in ``meta.pt``, with a tensor without values in place of each sharded one; the pieces, named by
their place in the checkpoint, are safetensors files of ``torch.distributed.checkpoint``. No file in it can run code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from aligntok.errors import UserError, check, words_of
from aligntok.files import hash_file

META, FILES = "meta.pt", "shard_files"  # SHA-256 by name of file


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a checkpoint in pieces."""
    return (Path(path) / META).is_file()


def replaced(value: Any, function: Callable[[str, Tensor], Any], key: str = "") -> Any:
    """Return nested dicts, lists and tuples with each tensor replaced by what a function makes of its key and itself.

    >>> replaced({"a": [torch.ones(2), 3]}, lambda key, tensor: key)
    {'a': ['a/0', 3]}
    """
    if isinstance(value, Tensor):
        return function(key, value)
    if isinstance(value, dict):
        return {name: replaced(part, function, f"{key}/{name}".lstrip("/")) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replaced(part, function, f"{key}/{index}") for index, part in enumerate(value))
    return value


def write_shards(checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the sharded tensors of a checkpoint, together with all other ranks, and return what ``meta.pt`` holds."""
    from torch.distributed.checkpoint.api import CheckpointException  # these imports take a while, and few need them
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    shards: dict[str, Tensor] = {}

    def taken(key: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        shards[key] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    meta = replaced(checkpoint, taken)
    try:
        save(shards, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # no Exception; of any rank, on all of them
        raise next(iter(error.failures.values()))[0] from error
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = {path.name: hash_file(path) for path in sorted(folder.glob("*.safetensors"))[rank::world]}
    hashes: list[Any] = [None] * world
    dist.all_gather_object(hashes, mine)
    return {**meta, FILES: {name: value for part in hashes for name, value in part.items()}}


def check_files(checkpoint: dict[str, Any], folder: str | Path, share: slice = slice(None)) -> None:
    """Raise a ``UserError`` where a share of the files, by default all, is not what was written."""
    check(bool(checkpoint.get(FILES)), f"{folder}/{META} is not of a sharded checkpoint: it lists no files")
    for name, value in sorted(checkpoint[FILES].items())[share]:
        path = Path(folder) / name
        whole = path.is_file() and hash_file(path) == value
        check(
            whole, f"{path} is missing or damaged: copy the folder again, or take an earlier checkpoint (step_*.ckpt)"
        )


def with_shards(checkpoint: dict[str, Any], folder: str | Path, empty: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return a checkpoint with the values of its sharded tensors, or of the part that this rank needs.

    Args:
        checkpoint: From ``meta.pt``, or a part of it.
        folder: Where the pieces are.
        empty: Makes the tensor to read into of one without values: a whole one, or one that is sharded.

    Raises:
        UserError: The files do not hold these tensors.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    shards: dict[str, Tensor] = {}

    def made(key: str, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            tensor = shards[key] = empty(tensor)
        return tensor

    filled: dict[str, Any] = replaced(checkpoint, made)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
            if shards:
                load(shards, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (CheckpointException, Exception) as error:  # torch, json and safetensors each raise their own kind
        raise UserError(f"{folder} is damaged, its pieces are not what was written ({words_of(error)})") from error
    return filled
