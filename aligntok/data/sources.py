"""What data come from: datasets of (PIL image, label) or (PIL image, caption), or sources of whole batches."""

from __future__ import annotations

import hashlib
import math
import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from aligntok.data.order import Indices, Permutation
from aligntok.errors import UserError, check

Captions = dict[str, float]
"""The captions of an image, each with the weight that it is chosen by."""

Item = tuple[Image.Image, Any]
Batch = dict[str, Any]
NUM_PROBES = 16


class BatchSource(Dataset[Any]):
    """Base of a source whose items come in batches of tensors, instead of one (PIL image, label) after the other.

    >>> class Zeros(BatchSource):
    ...     def __len__(self): return 100
    ...     def batch(self, ids, views): return {"latent": torch.zeros(len(ids), 4, 2, 2)}
    ...     def fingerprint(self): return "zeros"
    >>> Zeros().batch(np.array([7]), np.array([0]))["latent"].shape
    torch.Size([1, 4, 2, 2])
    """

    classes: Sequence[str] = ()
    """Names of the classes, where the source knows them."""

    images: Dataset[Item] | None = None
    """Images that are served beside the rows: then processes prepare the batches, else threads."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, ids: Indices, views: Indices) -> Batch:
        """Return a dict of tensors, one row for each id, ``label`` among them.

        Args:
            ids: Of the items, in any order, (B,).
            views: Which view of each, (B,): first those of the image as it is, of which 0 is the one to evaluate, then
                as many of the mirrored image, where there are any.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of what the source gives."""

    def num_views(self, flip: bool) -> int:
        """Return how many views training may choose from, those of mirrored images included or not.

        Raises:
            UserError: There are none of mirrored images.
        """
        check(not flip, f"{self} has no mirrored images: set augmentation.flip false")
        return 1


class Subset(Dataset[Item]):
    """Some images of a source, with its ``classes`` and a fingerprint, which torch's has not.

    >>> from aligntok.data import Digits
    >>> Subset(Digits(), [3, 5])[1] == Digits()[5]
    True
    """

    def __init__(self, source: Dataset[Any], indices: Sequence[int] | Indices | Permutation) -> None:
        self.source = source
        self.indices = indices if isinstance(indices, Permutation) else np.asarray(indices, dtype=np.int64)
        self.classes = getattr(source, "classes", [])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        item: Item = self.source[int(self.indices[index])]
        return item

    def batch(self, ids: Indices, views: Indices) -> Batch:
        """Return a batch of the source, where that is a ``BatchSource``."""
        batch: Batch = self.source.batch(self.indices[ids], views)  # type: ignore[attr-defined]
        return batch

    def fingerprint(self) -> str:
        """Return a hash of the source and the indices."""
        return hashlib.sha256(source_id(self.source).encode() + self.indices.tobytes()).hexdigest()[:16]


def batch_source(source: Dataset[Any]) -> BatchSource | None:
    """Return the ``BatchSource`` that a source is, or is a subset of; ``None`` for images."""
    while isinstance(source, Subset):
        source = source.source
    return source if isinstance(source, BatchSource) else None


def source_indices(source: Dataset[Any], ids: Sequence[int]) -> list[int]:
    """Return which images of the whole source the items ``ids`` are, where ``source`` is a subset of another."""
    while isinstance(source, (Subset, torch.utils.data.Subset)):
        ids = [int(source.indices[i]) for i in ids]
        source = source.source if isinstance(source, Subset) else source.dataset
    return list(ids)


def whole_source(source: Dataset[Any]) -> Dataset[Any]:
    """Return the source that this is, or is a subset of."""
    while isinstance(source, (Subset, torch.utils.data.Subset)):
        source = source.source if isinstance(source, Subset) else source.dataset
    return source


def read_item(source: Dataset[Any], index: int) -> tuple[Image.Image, int | Captions]:
    """Return an image with its label or captions.

    A source gives captions as a text, a list of texts, each as likely as the others, or a dict of texts and weights.

    Raises:
        UserError: The source gives something else, or ``None`` or nothing for a caption.
    """
    item: Any = source[index]
    parts = item if isinstance(item, (tuple, list)) else (item,)
    gives = f"{type(source).__name__} gives"
    if len(parts) != 2 or not isinstance(parts[0], Image.Image):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise UserError(
            f"{gives} ({kinds}), not (PIL image, label or caption): leave out its transform, aligntok crops itself"
        )
    image, target = parts
    if target is None or (isinstance(target, (list, tuple, Mapping)) and not target):
        raise UserError(f"image {index} of {type(source).__name__} has no caption")
    if isinstance(target, str):
        return image, {target: 1.0}
    numbers = target.values() if isinstance(target, Mapping) else ()
    texts = target if isinstance(target, (list, tuple, Mapping)) else (target,)
    if all(isinstance(text, str) for text in texts) and all(isinstance(number, (int, float)) for number in numbers):
        return image, weighted(target, f"{gives} captions")
    try:
        return image, operator.index(target)  # takes tensors and NumPy's numbers too
    except TypeError as error:
        remedy = "give it another target_type or target_transform"
        raise UserError(
            f"{gives} the label {str(target)[:40]!r}, neither a whole number nor a caption: {remedy}"
        ) from error


def weighted(names: Mapping[str, float] | Sequence[str], what: str) -> dict[str, float]:
    """Return names, each as likely as the others where there are no weights, as a dict of weights.

    Raises:
        UserError: A weight is negative or not finite, or all are 0; ``what`` says of what.
    """
    weights: dict[str, float] = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 0.0)
    if not isinstance(names, Mapping):
        for name in names:  # one that is given twice is twice as likely
            weights[name] += 1
    good = all(weight >= 0 and math.isfinite(weight) for weight in weights.values()) and any(weights.values())
    shown = str(list(weights.values()))[:60]
    check(good, f"{what} with weights {shown}: give finite ones, none below 0, some above")
    return weights


def source_id(source: Dataset[Any]) -> str:
    """Return what identifies the images of a source: its own fingerprint, or a hash of some of its images."""
    if hasattr(source, "fingerprint"):
        return str(source.fingerprint())
    count = length(source)
    digest = hashlib.sha256(f"{type(source).__name__} {count}".encode())
    for index in spread_over(count, NUM_PROBES):
        try:
            image, label = read_item(source, index)
            digest.update(f"{image.mode} {image.size} {label}".encode() + image.tobytes())
        except (UserError, OSError, SyntaxError):
            digest.update(b"unreadable")
    return digest.hexdigest()[:16]


def crop_id(source: Dataset[Any], image_size: tuple[int, ...]) -> str:
    """Return a hash of the images that evaluation sees: their source and their centre crop."""
    return hashlib.sha256(f"{source_id(source)} center crop {image_size}".encode()).hexdigest()[:16]


def spread_over(total: int, count: int) -> list[int]:
    """Return up to ``count`` numbers evenly spread over ``range(total)``."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def length(source: Dataset[Any]) -> int:
    """Return the number of images of a map-style source."""
    return len(source)  # type: ignore[arg-type]
