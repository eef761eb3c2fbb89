"""Loaders: where a pass begins and ends, and who reads ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from aligntok.data.batches import BatchDataset
from aligntok.data.sampler import InOrderSampler, ShuffledSampler
from aligntok.errors import UserError

BATCHES_PER_THREAD = 2  # read ahead, as torch's workers do


def as_it_is(batch: Any) -> Any:
    """Return the batch that a dataset made; as ``collate_fn`` of a loader."""
    return batch


class Loader(DataLoader[Any]):
    """torch's loader; batches that are only gathered from memory are read ahead by threads instead of processes.

    A process takes several times as long to hand a batch over as to gather it.
    """

    @property
    def num_threads(self) -> int:
        """Number of threads that read ahead."""
        return self.dataset.num_threads if isinstance(self.dataset, BatchDataset) else 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate over the batches of the sampler."""
        return prefetch(self, self.num_threads) if self.num_threads else super().__iter__()


class TrainLoader(Loader):
    """Batches from wherever the run stands; a pass has as many as an epoch, and may run into the next one.

    The position is kept by the data module, and counts batches handed out, not those that were read ahead.
    """

    running: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Begin at the first ``next``: Lightning asks for an iterator before it restores a checkpoint."""
        if not isinstance(self.sampler, ShuffledSampler):  # Lightning's overfit_batches puts in its own
            yield from super().__iter__()
            return
        if self.running is None or not (self.num_workers or self.num_threads):
            self.running = super().__iter__()  # else it goes on where the last pass ended: no wait for a new epoch
        for _ in range(len(self)):
            batch = next(self.running)
            self.sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing; that there is this method tells Lightning that a run can resume in mid-epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""


class EvaluationLoader(Loader):
    """Leaves out a batch without any readable image."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches."""
        for batch in super().__iter__():
            if batch is not None:
                yield batch
            elif isinstance(self.sampler, InOrderSampler) and self.sampler.num_replicas > 1:
                raise UserError("no image of a whole evaluation batch can be read: remove the files named above")


def prefetch(loader: DataLoader[Any], num_threads: int) -> Iterator[Any]:
    """Yield the batches of a loader in its order, while threads prepare the next ones."""
    dataset: Any = loader.dataset
    keys: Iterator[Sequence[Any]] = iter(loader.batch_sampler)  # type: ignore[arg-type]

    def read(batch: Sequence[Any]) -> dict[str, Any]:
        tensors = dataset.__getitems__(batch)
        return {key: value.pin_memory() for key, value in tensors.items()} if loader.pin_memory else tensors

    pool = ThreadPoolExecutor(num_threads)
    try:
        coming: deque[Future[Any]] = deque(
            pool.submit(read, batch) for batch in islice(keys, BATCHES_PER_THREAD * num_threads)
        )
        while coming:
            following = next(keys, None)
            batch = coming.popleft().result()
            if following is not None:
                coming.append(pool.submit(read, following))
            yield batch
    finally:  # without waiting: the garbage collector closes an abandoned pass, on any thread, even one that starts
        pool.shutdown(wait=False, cancel_futures=True)
