"""What the importers of published weights share: the state dict in a file, and its names mapped to ours and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from aligntok.weights.checkpoint import read_file


def read_official(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a file: ``ema``, ``model``, ``state_dict``, or the file itself; without ``module.``.

    Raises:
        UserError: There is no such file, it is no checkpoint, or it holds pickled code.
    """
    content = read_file(path)
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        return {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return {key.removeprefix("module."): value for key, value in tensors.items()}  # DDP's prefix


def official_names(key: str, names: dict[str, str]) -> list[str]:
    """Return the official name of one of our tensors, or the two names of its halves.

    >>> official_names("blocks.0.mlp.proj_in.bias", {"blocks.": "layers.", ".proj_in.": ".w1. .w3."})
    ['layers.0.mlp.w1.bias', 'layers.0.mlp.w3.bias']

    Args:
        key: Our name.
        names: Pieces of our names and what stands for them there, applied one after the other; two halves of a tensor
            are separated by a space.
    """
    keys = [key]
    for ours, theirs in names.items():
        if ours in keys[0]:
            keys = [key.replace(ours, piece) for key in keys for piece in theirs.split()]
    return keys


def to_official(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return one of our state dicts under the official names."""
    official: dict[str, Tensor] = {}
    for key, value in state.items():
        keys = official_names(key, names)
        official |= zip(keys, value.chunk(len(keys)), strict=True)
    return official


@torch.no_grad()
def copy_official_(module: nn.Module, official: dict[str, Tensor], names: dict[str, str]) -> None:
    """Copy the tensors of an official state dict into a module; shapes may differ by axes of size 1."""
    for key, value in module.state_dict().items():
        keys = official_names(key, names)
        for half, name in zip(value.chunk(len(keys)), keys, strict=True):
            half.copy_(official[name].reshape(half.shape))
