"""Which images a rank takes, in which order, and a loader that reads them ahead.

The order is a function of (seed, epoch): nothing to store but a position, and the same on any number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from aligntok.data.order import Key, Keys, shuffled_keys
from aligntok.errors import UserError, check

BATCHES_PER_THREAD = 2  # read ahead, as torch's workers do
KEYS_AT_ONCE = 4096  # of a rank; so an epoch's order is never in memory as a whole where the source is large

T = TypeVar("T")
Result = TypeVar("Result")


@dataclass
class Position:
    """Where the next image of a run is.

    Attributes:
        epoch: From 0.
        image: In the order of that epoch, over all ranks.
    """

    epoch: int = 0
    image: int = 0


class ShuffledSampler(DistributedSampler[Key]):
    """One rank's share of the shuffled images, without end, from wherever the run stands.

    The images of an optimizer step are the same set whatever the number of ranks and of accumulated batches; the rest
    of an epoch that does not fill a step is dropped. A ``DistributedSampler``, so that Lightning leaves it alone.

    >>> sampler = ShuffledSampler(26, global_batch_size=8, batch_size=4, rank=0, world_size=2, seed=0)
    >>> len(sampler), len(list(islice(sampler, 100)))
    (12, 100)

    Args:
        num_images: Images of the source.
        global_batch_size: Images per optimizer step.
        batch_size: Images per batch on one rank.
        rank: Of this process.
        world_size: Number of ranks.
        seed: Of the order.
        position: Where to begin, by default at the first image; ``advance`` moves it.
        keys: Order of each epoch, where the source has its own: ``Mixture.keys``.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        position: Position | None = None,
        keys: Callable[[int, int], Keys] | None = None,
    ) -> None:
        super().__init__(range(num_images), world_size, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.keys = keys or partial(shuffled_keys, num_images)
        self.num_images, self.batch, self.position = num_images, batch_size * world_size, position or Position()
        self.end = num_images - num_images % global_batch_size  # of an epoch

    def __len__(self) -> int:
        return self.end // self.num_replicas

    def __iter__(self) -> Iterator[Key]:
        self.skip_rest()
        epoch, image = self.position.epoch, self.position.image
        while True:
            end = self.end - (self.end - image) % self.batch  # after a change of batch size, the middle of an epoch
            keys = self.keys(self.seed, epoch)
            step = KEYS_AT_ONCE * self.num_replicas
            for first in range(image + self.rank, end, step):
                yield from keys(np.arange(first, min(first + step, end), self.num_replicas))
            epoch, image = epoch + 1, 0

    def advance(self) -> None:
        """Note that all ranks have taken one more batch."""
        self.position.image += self.batch
        self.skip_rest()

    def skip_rest(self) -> None:
        """Go to the next epoch where what is left of this one fills no batch."""
        if self.position.image + self.batch > self.end:
            self.position.epoch, self.position.image = self.position.epoch + 1, 0


class InOrderSampler(DistributedSampler[int]):
    """One rank's share of the images in order, each exactly once over all ranks: no padding.

    >>> list(InOrderSampler(range(5), rank=1, world_size=2))
    [1, 3]
    """

    def __init__(self, indices: Sequence[int], rank: int, world_size: int) -> None:
        super().__init__(indices, world_size, rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = indices[rank::world_size]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def even_batch_size(count: int, world_size: int, batch_size: int) -> int:
    """Return the batch size, at best ``batch_size``, with which all ranks get equally many batches of ``count`` images.

    A step may wait for other ranks (FSDP gathers weights, metrics are synchronised): one more on one rank would hang.

    Raises:
        UserError: There are fewer images than ranks.
    """
    share, rest = divmod(count, world_size)
    if not rest:
        return batch_size
    check(share > 0, f"{count} images are too few for {world_size} devices: each needs one, give more images")
    # some ranks have one image more: that needs no further batch unless the share fills its batches exactly
    sizes = (*range(batch_size, 0, -1), *range(batch_size + 1, share + 2))
    fitting: int = next(size for size in sizes if share % size)
    return fitting


class Loader(DataLoader[Any]):
    """torch's loader, of a dataset that makes whole batches (``as_it_is`` collates them).

    With a ``ShuffledSampler`` a pass begins wherever the run stands; it has as many batches as an epoch, and may run
    into the next one. Any other sampler's batches without a readable image are left out. Batches that are only gathered
    from memory are read ahead by threads (``num_threads`` of the dataset): to hand a batch over, a process needs
    several times as long as to gather it.
    """

    running: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Begin at the first ``next``: Lightning asks for an iterator before it restores a checkpoint."""
        if isinstance(self.sampler, ShuffledSampler):
            if self.running is None or not (self.num_workers or self.num_threads):
                self.running = self.batches()  # else it goes on where the last pass ended: no wait for a new epoch
            for _ in range(len(self)):
                batch = next(self.running)
                self.sampler.advance()  # counts batches handed out, not those read ahead
                yield batch
            return
        for batch in self.batches():
            if batch is not None:
                yield batch
            elif isinstance(self.sampler, InOrderSampler) and self.sampler.num_replicas > 1:
                raise UserError("no image of a whole evaluation batch can be read: remove the files named above")

    @property
    def num_threads(self) -> int:
        """Number of threads that read ahead."""
        return getattr(self.dataset, "num_threads", 0)

    def batches(self) -> Iterator[Any]:
        """Return an iterator over the batches of the sampler."""
        dataset: Any = self.dataset
        if not self.num_threads:
            return super().__iter__()

        def read(keys: Sequence[Any]) -> dict[str, Any]:
            batch = dataset.__getitems__(keys)
            return {key: value.pin_memory() for key, value in batch.items()} if self.pin_memory else batch

        return read_ahead(read, self.batch_sampler or (), BATCHES_PER_THREAD * self.num_threads, self.num_threads)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module keeps the position. The method tells Lightning that a run can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing; see ``state_dict``."""


def as_it_is(batch: Any) -> Any:
    """Return the batch that a dataset made; the ``collate_fn`` of a loader."""
    return batch


def read_ahead(
    read: Callable[[T], Result], items: Iterable[T], count: int, num_threads: int | None = None
) -> Iterator[Result]:
    """Yield ``read(item)`` of each item, in order, while threads read the ``count`` items that come next.

    >>> list(read_ahead(str, [3, 1, 2], count=2))
    ['3', '1', '2']
    """
    left = iter(items)
    pool = ThreadPoolExecutor(num_threads)
    try:
        coming = deque(pool.submit(read, item) for item in islice(left, count))
        while coming:
            result = coming.popleft().result()
            coming.extend(pool.submit(read, item) for item in islice(left, 1))
            yield result
    finally:  # without waiting: the garbage collector closes an abandoned pass, on any thread, even one that starts
        pool.shutdown(wait=False, cancel_futures=True)
