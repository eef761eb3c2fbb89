"""Sample order as a function of (seed, epoch): nothing to store but a position, and the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DistributedSampler

from aligntok.data.sources import Indices
from aligntok.errors import UserError

Key = tuple[int, int]  # epoch, index of the image


@dataclass
class Position:
    """Where the next image of a run is."""

    epoch: int = 0
    image: int = 0  # in the order of that epoch, over all ranks


class ShuffledSampler(DistributedSampler[Key]):
    """One rank's share of the shuffled images, without end, from wherever the run stands.

    The images of an optimizer step are the same set whatever the number of ranks and of accumulated batches; the rest
    of an epoch that does not fill a step is dropped. A ``DistributedSampler``, so that Lightning leaves it alone.

    Args:
        num_images: Images of the source.
        global_batch_size: Images per optimizer step.
        batch_size: Images per batch on one rank.
        rank: Of this process.
        world_size: Number of ranks.
        seed: Of the order.
        position: Where to begin; ``advance`` moves it.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        position: Position,
    ) -> None:
        super().__init__(range(num_images), world_size, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.num_images, self.batch, self.position = num_images, batch_size * world_size, position
        self.end = num_images - num_images % global_batch_size  # of an epoch

    def __len__(self) -> int:
        return self.end // self.num_replicas

    def __iter__(self) -> Iterator[Key]:
        self.skip_rest()
        epoch, image = self.position.epoch, self.position.image
        while True:
            end = self.end - (self.end - image) % self.batch  # after a change of batch size, the middle of an epoch
            for index in shuffled(self.num_images, self.seed, epoch)[image + self.rank : end : self.num_replicas]:
                yield epoch, int(index)
            epoch, image = epoch + 1, 0

    def advance(self) -> None:
        """Note that all ranks have taken one more batch."""
        self.position.image += self.batch
        self.skip_rest()

    def skip_rest(self) -> None:
        """Go to the next epoch where what is left of this one fills no batch."""
        if self.position.image + self.batch > self.end:
            self.position.epoch, self.position.image = self.position.epoch + 1, 0


class InOrderSampler(DistributedSampler[Key]):
    """One rank's share of the images in order, each exactly once over all ranks: no padding.

    Args:
        indices: The images, in order.
        rank: Of this process.
        world_size: Number of ranks.
    """

    def __init__(self, indices: Sequence[int] | Indices, rank: int, world_size: int) -> None:
        super().__init__(indices, world_size, rank, shuffle=False)  # type: ignore[arg-type]
        self.mine = indices[rank::world_size]

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[Key]:
        return ((0, int(index)) for index in self.mine)


def shuffled(count: int, seed: int, epoch: int) -> Indices:
    """Return the order of ``count`` images in an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: Indices = torch.randperm(count, generator=generator).numpy()
    return order


def even_batch_size(count: int, world_size: int, batch_size: int) -> int:
    """Return the batch size, at best ``batch_size``, with which all ranks get equally many batches of ``count`` images.

    A step may wait for other ranks (FSDP gathers weights, metrics are synchronised): one more on one rank would hang.

    Raises:
        UserError: There are fewer images than ranks.
    """
    share, rest = divmod(count, world_size)
    if not rest:
        return batch_size
    if not share:
        raise UserError(f"{count} images are too few for {world_size} devices: each needs one, give more images")
    # some ranks have one image more: that needs no further batch unless the share fills its batches exactly
    sizes = (*range(batch_size, 0, -1), *range(batch_size + 1, share + 2))
    fitting: int = next(size for size in sizes if share % size)
    return fitting
