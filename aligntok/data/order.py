"""The order of an epoch: a function of (seed, epoch) and a place in it, so that a position is all there is to store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from aligntok.randomness import permuted

LARGE = 1 << 24  # rows; 134 MB of numbers, an epoch's order in memory

Indices = npt.NDArray[np.int64]
Key = tuple[int, int]  # epoch, index of the image
Keys = Callable[[Indices], list[Key]]
"""Gives the keys at some places of an epoch's order."""


class Permutation:
    """An order of 0 .. ``count`` - 1, or a range of places in it, of which nothing is in memory.

    >>> sorted(Permutation(5, seed=0, epoch=3)[:].tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, count: int, seed: int, epoch: int, places: range | None = None) -> None:
        self.count, self.seed, self.epoch = count, seed, epoch
        self.places = range(count) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, places: int) -> int: ...
    @overload
    def __getitem__(self, places: slice | Indices) -> Indices: ...
    def __getitem__(self, places: Any) -> Any:
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)))
        found = permuted(np.atleast_1d(places) + self.places.start, self.count, self.seed, self.epoch)
        return found if np.ndim(places) else int(found[0])

    def tobytes(self) -> bytes:
        """Return what identifies it, for a hash."""
        return f"{self.count} {self.seed} {self.epoch} {self.places}".encode()


def shuffled(count: int, seed: int, epoch: int) -> Indices | Permutation:
    """Return the order of ``count`` images in an epoch; of more than ``LARGE`` it is not in memory."""
    if count > LARGE:
        return Permutation(count, seed, epoch)
    order: Indices = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).numpy()
    return order


def shuffled_keys(count: int, seed: int, epoch: int) -> Keys:
    """Return the keys of an epoch of ``count`` images."""
    return partial(_keys, shuffled(count, seed, epoch), epoch)


def _keys(order: Indices | Permutation, epoch: int, places: Indices) -> list[Key]:
    return [(epoch, index) for index in order[places].tolist()]
