"""Several sources as one, each as often as its weight says."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from aligntok.data.order import LARGE, Indices, Key, Keys, Permutation, shuffled
from aligntok.data.sources import Item, Subset, batch_source, length, source_id
from aligntok.errors import check

MAX_PERIOD = 1 << 16  # rows; weights that need a longer one are rounded to it
PASSES = 2  # orders of each source that are kept: one ends while the next begins


class Mixture(Dataset[Item]):
    """Images of several sources, shuffled and interleaved by weights.

    Training sees rows in a fixed turn in which each source has its exact share; each goes through its own shuffled
    order, again and again. So a position says where all of them are, on any number of ranks. An epoch has as many rows
    as the sources have images. Evaluation sees each image of all sources once.

    >>> from aligntok.data import Digits
    >>> mixture = Mixture([Digits("train"), Digits("val")], weights=[3, 1])
    >>> len(mixture), mixture.turn.tolist()
    (1797, [0, 0, 1, 0])

    Args:
        sources: Items (PIL image, label or captions), of one kind.
        weights: Of each source, in any unit; equal ones by default. 0 leaves a source out of training.

    Raises:
        UserError: Not as many weights as sources, a negative one, all 0, or one below 1/65,536 of their sum.
    """

    def __init__(self, sources: list[Dataset], weights: list[float] | None = None) -> None:  # type: ignore[type-arg]
        check(bool(sources), "a mixture of no sources: name some")
        weights = [1.0] * len(sources) if weights is None else weights
        check(len(weights) == len(sources), f"{len(weights)} weights for {len(sources)} sources: give one for each")
        good = all(weight >= 0 and math.isfinite(weight) for weight in weights) and any(weights)
        check(good, f"weights {weights} of a mixture: give finite ones, none below 0, some above")
        caches = [type(source).__name__ for source in sources if batch_source(source) is not None]
        check(not caches, f"a mixture of {', '.join(caches)}: mix the images, and cache the mixture")
        self.sources: list[Any] = list(sources)
        self.weights = weights
        counts = turn_counts(weights)
        small = [weight for weight, count in zip(weights, counts, strict=True) if weight and not count]
        check(not small, f"weights {small} of a mixture are below 1/{MAX_PERIOD} of the sum: leave these sources out")
        # the j-th of a source's c rows stands at (j + 1/2) / c of the turn: as evenly spread as whole rows can be
        numbers = np.concatenate([np.full(count, number) for number, count in enumerate(counts)])
        within = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((within + 0.5) / np.asarray(counts)[numbers], kind="stable")
        self.counts, self.turn, self.within = np.asarray(counts), numbers[order], within[order]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, where all sources have the same."""
        names = [[str(name) for name in getattr(source, "classes", [])] for source in self.sources]
        return names[0] if all(own == names[0] for own in names) else []

    @property
    def starts(self) -> list[int]:
        """Number of the first image of each source, and of all images."""
        return [0, *accumulate(length(source) for source in self.sources)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Item:
        starts = self.starts
        number = int(np.searchsorted(starts, index, "right")) - 1
        item: Item = self.sources[number][index - starts[number]]
        return item

    def keys(self, seed: int, epoch: int) -> Keys:
        """Return the keys of an epoch: how often a source has been gone through, and the image."""
        return partial(
            self._keys, lru_cache(PASSES * len(self.sources))(shuffled), np.asarray(self.starts), seed, epoch
        )

    def _keys(self, orders: Any, starts: Indices, seed: int, epoch: int, places: Indices) -> list[Key]:
        turns, slots = np.divmod(places + epoch * int(starts[-1]), len(self.turn))
        numbers = self.turn[slots]
        drawn = turns * self.counts[numbers] + self.within[slots]  # rows of the source before this one
        passes, own = np.divmod(drawn, np.diff(starts)[numbers])
        ids = np.empty_like(own)
        for number, one in {*zip(numbers.tolist(), passes.tolist(), strict=True)}:
            chosen = (numbers == number) & (passes == one)
            order = orders(int(starts[number + 1] - starts[number]), seed + number, one)
            ids[chosen] = starts[number] + order[own[chosen]]
        return list(zip(passes.tolist(), ids.tolist(), strict=True))

    def of(self, sources: Sequence[Dataset[Any]]) -> Mixture:
        """Return a mixture of others by the same weights."""
        return Mixture(list(sources), self.weights)

    def fingerprint(self) -> str:
        """Return a hash of all sources."""
        return hashlib.sha256(" ".join(map(source_id, self.sources)).encode()).hexdigest()[:16]


def turn_counts(weights: Sequence[float]) -> list[int]:
    """Return how many rows of a turn each source has: exactly by the weights where a turn of 65,536 rows allows it.

    >>> turn_counts([0.2, 0.3, 0.5]), turn_counts([0, 7])
    ([2, 3, 5], [0, 1])
    """
    shares = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    whole = [int(share * math.lcm(*(share.denominator for share in shares))) for share in shares]
    counts = [count // math.gcd(*whole) for count in whole] if any(whole) else whole
    if 0 < sum(counts) <= MAX_PERIOD:
        return counts
    total = math.fsum(weights)
    return [round(weight / total * MAX_PERIOD) for weight in weights]


def split_holdout(
    source: Dataset[Any], share: float, image_ids: Indices | None = None, count: int | None = None
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Split a source into one for training and a held-out ``share``, the same split each time.

    A smaller share is part of a greater one. Of a mixture each source is split.

    Args:
        source: The images, or a cache.
        share: Of the images, to hold out.
        image_ids: Of a cache, the image of each row: its images are split as their source was.
        count: Images of that source, those included that have no row.

    Raises:
        UserError: The share leaves one of the two empty.
    """
    if isinstance(source, Mixture):
        parts = [split_holdout(one, share) for one in source.sources]
        return source.of([train for train, _ in parts]), source.of([held for _, held in parts])
    total = length(source)
    if image_ids is None and total > LARGE:  # no list of all of them in memory
        places = range(total)[: round(total * share)], range(total)[round(total * share) :]
        held_out, kept = (Subset(source, Permutation(total, 0, 0, part)) for part in places)
        return kept, held_out
    image_ids = np.arange(total) if image_ids is None else image_ids
    count = len(image_ids) if count is None else count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    is_held = np.isin(image_ids, order[: round(count * share)])
    held, total = int(is_held.sum()), len(is_held)
    what = f"val={share} of {total} images leaves {held} for validation: change the share, or name images"
    check(0 < held < total, what)
    return Subset(source, np.flatnonzero(~is_held)), Subset(source, np.flatnonzero(is_held))
