"""Features that are kept until the end of a measurement."""

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from aligntok.errors import UserError
from aligntok.randomness import hashed


class Collected:
    """Features of images with ids and labels, brought together from all ranks in the order of the ids.

    >>> collected = Collected(width=2)
    >>> collected.add(torch.tensor([7, 3]), None, torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    >>> ids, _, features = collected.gather(torch.device("cpu"))
    >>> ids, features
    (tensor([3, 7]), tensor([[0., 2.],
            [1., 1.]]))

    Args:
        width: Dimensions of the features that are kept; 0 keeps ids and labels only.
        limit: Keep those of at most so many images, a uniform choice by a hash of their ids.
    """

    def __init__(self, width: int, limit: int | None = None) -> None:
        self.width, self.limit = width, limit
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.seen = 0

    def add(self, id: Tensor | None, label: Tensor | None, features: Tensor) -> None:
        """Add features (B, D) of images with ids (B,), by default in the order they come, and labels (B,), if known."""
        if id is None:
            rank, ranks = rank_and_number()
            id = torch.arange(self.seen, self.seen + len(features), device=features.device) * ranks + rank
        self.seen += len(features)
        label = torch.full_like(id, -1) if label is None else label
        keys = torch.stack([id, label], dim=1).to(features.device, torch.int64)
        self.parts.append((keys, features[:, : self.width].float()))
        if self.limit is not None and sum(len(keys) for keys, _ in self.parts) > 2 * self.limit:
            self.parts = [self.chosen(*map(torch.cat, zip(*self.parts, strict=True)))]

    def gather(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids (N,), labels (N,), -1 where unknown, and features (N, width) of all ranks.

        Raises:
            UserError: An id occurs twice.
        """
        empty = torch.empty(0, 2, dtype=torch.int64, device=device), torch.empty(0, self.width, device=device)
        keys, features = (torch.cat(column) for column in zip(empty, *self.parts, strict=True))
        if dist.is_initialized():
            keys = torch.cat(gather_all_tensors(keys))
            features = torch.cat(gather_all_tensors(features)) if self.width else features.new_empty(len(keys), 0)
        keys, features = self.chosen(keys, features)
        order = keys[:, 0].argsort()
        ids, labels = keys[order].unbind(dim=1)
        twice = ids[1:][ids[1:] == ids[:-1]]
        if len(twice):
            raise UserError(
                f"image {twice[0].item()} was measured twice (and {len(twice) - 1} others): each image needs an id of "
                "its own, and reset() before the next set"
            )
        return ids, labels, features[order]

    def chosen(self, keys: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return at most ``limit`` rows; whether an image is among them does not depend on the order."""
        if self.limit is None or len(keys) <= self.limit:
            return keys, features
        rows = hashed(keys[:, 0]).argsort()[: self.limit]
        return keys[rows], features[rows]


def rank_and_number() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
