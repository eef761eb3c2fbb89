"""What stages and callbacks ask of a data module, as protocols, and the one place that looks whether it is there.

``LatentDataModule`` offers all of them. A data module of your own needs those of the stage and the callbacks that you
use; each of them says in its ``setup`` which methods are missing. Plain data loaders, without a data module, are enough
for whatever asks for nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from aligntok.errors import check

if TYPE_CHECKING:
    from aligntok.networks.text import TextEncoder
    from aligntok.networks.tokenizer import Tokenizer

Batch = dict[str, Any]
T = TypeVar("T")
COMMON = {"batch_size", "global_batch_size", "accumulation", "classes"}  # what any data module may call its own


class HasCalibration(Protocol):
    """Training images without augmentation, always the same: to measure latents and to fit the linear probe."""

    def calibration_dataloader(self) -> Iterable[Batch]:
        """Yield this rank's share of the images in batches with ``image``, ``label`` and ``id``."""


class HasPreview(Protocol):
    """A few validation images to look at."""

    def preview(self, count: int) -> Tensor:
        """Return up to ``count`` images (count, 3, H, W) in [0, 1]."""


class HasReferenceImages(Protocol):
    """Real images that samples are compared with."""

    def reference_images(self, source: Any, image_size: tuple[int, int]) -> tuple[str, Iterator[Batch]]:
        """Return a name of the set and its batches, each image once over all ranks; ``None`` means training images."""


class HasFingerprint(Protocol):
    """A name for the images of a split, so that what was measured on them can be kept."""

    def fingerprint(self, split: str) -> str:
        """Return a hash of the images of ``train``, ``val`` or ``test`` as evaluation sees them."""


class HasSourceIndices(Protocol):
    """Where an image of a split, which may be a subset of a source, stands in that source."""

    def source_indices(self, split: str, ids: Sequence[int]) -> list[int]:
        """Return the places in the source of the images ``ids`` of ``train``, ``val`` or ``test``."""


class HasNumImages(Protocol):
    """How many images there are, and how many of them are in a step: for the lines that a run prints at its start."""

    @property
    def global_batch_size(self) -> int:
        """Images of an optimizer step: over all ranks and accumulated batches."""

    @property
    def batch_size(self) -> int:
        """Images of a batch on one rank."""

    @property
    def accumulation(self) -> int:
        """Batches of an optimizer step."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty where there are none."""

    def num_images(self, split: str) -> int:
        """Return the number of images of a split."""


class HasLabels(Protocol):
    """Classes that can be compared with a network's before the first batch."""

    def check_labels(self, num_classes: int, key: str) -> None:
        """Raise a ``UserError`` where there are more classes than ``num_classes``, which the user knows as ``key``."""


class HasCache(Protocol):
    """Batches that may hold cached latents or tokens, and know which tokenizer wrote them."""

    @property
    def has_latents(self) -> bool:
        """Whether some of the batches hold cached latents or tokens."""

    @property
    def has_images(self) -> bool:
        """Whether all batches hold images, be it beside cached latents."""

    def check_latents(self, latent_shape: tuple[int, ...], tokenizer: Tokenizer | None, key: str) -> None:
        """Raise a ``UserError`` where cached latents have another shape or were written by another tokenizer."""

    def check_tokens(self, sizes: dict[str, Any], tokenizer: Tokenizer | None) -> None:
        """Raise a ``UserError`` where cached tokens have other sizes or were written by another tokenizer."""


class HasTexts(Protocol):
    """Batches with ``caption``, or with ``text_ids`` and ``text_features`` of a cache, which know their encoder."""

    def check_text(self, encoder: TextEncoder) -> None:
        """Raise a ``UserError`` where a cache has no texts, or those of another text encoder."""


def labels_of(batch: Batch) -> Tensor:
    """Return the labels of a batch, (B,); 0 of all images that have captions instead."""
    labels: Tensor = batch["label"] if "label" in batch else torch.zeros_like(batch["id"])
    return labels


def missing(data: Any, protocol: type) -> list[str]:
    """Return the methods of a protocol that the data lacks, without calling any of them."""
    names = [name for name in vars(protocol) if not name.startswith("_")]
    return [name for name in names if inspect.getattr_static(data, name, None) is None]


def needed_data(trainer: Any, protocol: type[T], who: str, remedy: str) -> T:
    """Return the data module, which must offer a protocol; call this in ``setup``.

    Args:
        trainer: Of the run.
        protocol: What is asked for.
        who: Class that asks, for the message.
        remedy: What to do instead of adding the methods, for the message.

    Raises:
        UserError: There is no data module or some of the methods are missing; names them.
    """
    data: Any = getattr(trainer, "datamodule", None)  # Lightning sets the attribute only where there is one
    methods = " and ".join(f"{name}()" for name in missing(data, protocol))
    where = "a data module" if data is None else f"the data module {type(data).__name__}"
    check(not methods, f"{who} needs {where} with {methods}; or {remedy}")
    return data  # type: ignore[no-any-return]


def offered_data(trainer: Any, protocol: type[T]) -> T | None:
    """Return the data module if it offers a protocol, or ``None`` if it has none of its methods.

    Names that anyone's data module may have, such as ``batch_size``, say nothing.

    Raises:
        UserError: It has some of the methods but not all; names those that are missing.
    """
    data: Any = getattr(trainer, "datamodule", None)
    lacking = missing(data, protocol)
    if not lacking:
        return data  # type: ignore[no-any-return]
    offered = {name for name in vars(protocol) if not name.startswith("_")} - set(lacking) - COMMON
    check(
        not offered,
        f"the data module {type(data).__name__} has some methods of aligntok.protocols.{protocol.__name__}, but not"
        f" {', '.join(lacking)}: add these",
    )
    return None
