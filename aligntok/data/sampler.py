"""Sample order as a function of (seed, epoch): nothing to store but a position, and the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DistributedSampler

Position = tuple[int, int]  # epoch, batches of that epoch already taken
Key = tuple[int, int]  # epoch, index of the image


class ShuffledSampler(DistributedSampler[Key]):
    """One rank's share of the shuffled images, whole global batches only, from wherever the run stands.

    Global batch ``b`` of an epoch is the same set of images whatever the number of ranks. A ``DistributedSampler``, so that
    Lightning leaves it alone.

    Args:
        num_images: Images of the source.
        batch_size: Images per batch on one rank.
        rank: Of this process.
        world_size: Number of ranks.
        seed: Of the order.
        position: Asked at the start of each pass: (epoch, batches already taken).
    """

    def __init__(
        self, num_images: int, batch_size: int, rank: int, world_size: int, seed: int, position: Callable[[], Position]
    ) -> None:
        super().__init__(range(num_images), world_size, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.num_images, self.batch_size, self.position = num_images, batch_size, position
        self.num_batches = num_images // (batch_size * world_size)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        epoch, batch = self.position()
        order = shuffled(self.num_images, self.seed, epoch)[: len(self) * self.num_replicas]
        mine = order[self.rank :: self.num_replicas][batch * self.batch_size :]
        return iter([(epoch, index) for index in mine])


class InOrderSampler(DistributedSampler[Key]):
    """One rank's share of the images in order, each exactly once over all ranks: no padding.

    Args:
        indices: The images, in order.
        rank: Of this process.
        world_size: Number of ranks.
    """

    def __init__(self, indices: list[int], rank: int, world_size: int) -> None:
        super().__init__(indices, world_size, rank, shuffle=False)  # type: ignore[arg-type]
        self.mine = indices[rank::world_size]

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[Key]:
        return iter([(0, index) for index in self.mine])


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """Return the order of ``count`` images in an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()
