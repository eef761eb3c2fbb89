"""Sources that give whole batches of tensors at once: cached latents, labels to sample."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aligntok.data.sampler import Key
from aligntok.data.sources import Indices, Subset, length
from aligntok.randomness import choices

Batch = dict[str, Tensor]


class BatchSource(Dataset[Any]):
    """Base of a source whose items come in batches, instead of one (PIL image, label) after the other.

    >>> class Zeros(BatchSource):
    ...     def __len__(self): return 100
    ...     def batch(self, ids, views): return {"latent": torch.zeros(len(ids), 4, 2, 2)}
    ...     def fingerprint(self): return "zeros"
    >>> BatchDataset(Zeros(), seed=0, num_views=1, num_threads=1)[7]["latent"].shape
    torch.Size([1, 4, 2, 2])
    """

    classes: Sequence[str] = ()
    """Names of the classes, where the source knows them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, ids: Indices, views: Indices) -> Batch:
        """Return a dict of tensors, one row for each id, ``label`` among them.

        Args:
            ids: Of the items, in any order, (B,).
            views: Which view of each, (B,), in 0 .. ``num_views`` - 1: first those of the image as it is, of which 0 is
                the one to evaluate, then, where ``has_mirrored``, as many of the mirrored image.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of what the source gives."""

    @property
    def num_views(self) -> int:
        """Rows that there are of an item."""
        return 1

    @property
    def has_mirrored(self) -> bool:
        """Whether there are rows of mirrored images."""
        return False

    @property
    def needs_processes(self) -> bool:
        """Whether a batch is so much work that processes should prepare it; else threads read ahead."""
        return False


class BatchDataset(Dataset[Any]):
    """Batches of a ``BatchSource`` (or of a part of one) with their ``id``; a function of (seed, epoch, ids).

    Args:
        source: Gives the rows.
        seed: Of the choice of views.
        num_views: Take one of the first so many, each as often as the others.
        num_threads: So many threads read ahead.
    """

    def __init__(self, source: Dataset[Any], seed: int, num_views: int, num_threads: int) -> None:
        self.source: Any = source
        self.seed, self.num_views, self.num_threads = seed, num_views, num_threads

    def __len__(self) -> int:
        return length(self.source)

    def __getitem__(self, key: Key | int) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key | int]) -> Batch:
        """Return the batch of these keys; torch's loader calls this instead of asking for one item after the other."""
        epochs, ids = np.array([key if isinstance(key, tuple) else (0, key) for key in keys], dtype=np.int64).T.copy()
        views = choices(self.num_views, self.seed, epochs, ids)
        return {**self.source.batch(ids, views), "id": torch.from_numpy(ids)}


def batch_source(source: Dataset[Any]) -> BatchSource | None:
    """Return the ``BatchSource`` behind a source or a part of one; ``None`` for images."""
    while isinstance(source, Subset):
        source = source.source
    return source if isinstance(source, BatchSource) else None
